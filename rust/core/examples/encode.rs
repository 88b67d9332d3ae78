//! How fast grids are encoded on one thread:
//! `cargo run --release -p being-vl-core --example encode VOCABULARY.json GRIDS.npy`, where the grids are an (N, H, W)
//! array of little-endian uint16 in C order.

use std::time::Instant;

use being_vl_core::{EncodeOptions, Encoder, Grid, Interrupt, Vocabulary};

const ROUNDS: usize = 31;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [_, vocabulary, grids] = &std::env::args().collect::<Vec<_>>()[..] else {
        return Err("expected VOCABULARY.json GRIDS.npy".into());
    };
    let encoder = Encoder::new(&Vocabulary::from_json(&std::fs::read_to_string(vocabulary)?)?)?;
    let grids = read(&std::fs::read(grids)?).ok_or("expected an (N, H, W) array of uint16")?;
    let cells: usize = grids.iter().map(|grid| grid.ids().len()).sum();
    let mut seconds = Vec::new();
    let mut tokens = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let batch = encoder.encode_batch(&grids, &EncodeOptions::default(), 1, &Interrupt::default())?;
        seconds.push(start.elapsed().as_secs_f64());
        tokens = batch.values.len();
    }
    seconds.sort_by(f64::total_cmp);
    let speed = |seconds: f64| cells as f64 / seconds / 1e6;
    println!(
        "{cells} ids, {tokens} tokens: {:.1} million ids a second, at best {:.1}",
        speed(seconds[ROUNDS / 2]),
        speed(seconds[0])
    );
    Ok(())
}

/// The grids of a .npy file.
fn read(file: &[u8]) -> Option<Vec<Grid>> {
    let length = usize::from(u16::from_le_bytes(*file.get(8..)?.first_chunk()?));
    let header = std::str::from_utf8(file.get(10..10 + length)?).ok()?;
    if !header.contains("'<u2'") || !header.contains("'fortran_order': False") {
        return None;
    }
    let shape = header.split_once("'shape': (")?.1.split_once(')')?.0;
    let sides: Vec<usize> = shape.split(", ").map(str::parse).collect::<Result<_, _>>().ok()?;
    let &[_, height, width] = &sides[..] else { return None };
    let (ids, _) = file[10 + length..].as_chunks();
    let ids: Vec<u32> = ids.iter().map(|&id| u16::from_le_bytes(id).into()).collect();
    let grids = ids.chunks_exact(height * width).enumerate();
    grids.map(|(index, ids)| Grid::new(index, height, width, ids.to_vec()).ok()).collect()
}
