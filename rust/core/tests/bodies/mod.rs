//! What the fuzz targets do with bytes; shared with `tests/hostile.rs`. A body that does not return normally shows a
//! bug.

use being_vl_core::{
    Dropout, EncodeOptions, Encoder, Grid, Interrupt, MergeMode, TrainOptions, Vocabulary, train,
};

/// Reads bytes as a vocabulary file. If it is one, it survives being written, and encodes and decodes a grid.
pub fn read_vocabulary(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(vocabulary) = Vocabulary::from_json(text) else { return };
    let copy = Vocabulary::from_json(&vocabulary.to_json().unwrap()).unwrap();
    assert_eq!(copy, vocabulary);
    let k = vocabulary.base_vocab_size();
    let ids: Vec<u32> = (0..20).map(|cell| cell * 7 % 3 % k).collect();
    round_trip(
        &vocabulary,
        &Grid::new(0, 4, 5, ids).unwrap(),
        &EncodeOptions { regions: true, dropout: None },
    );
    decode_any(&vocabulary, &[0, vocabulary.vocab_size() - 1, vocabulary.vocab_size(), u32::MAX]);
    // Listing the cells of the biggest token ends, however often the file doubles it.
    drop(vocabulary.token_to_cells(vocabulary.vocab_size() - 1));
}

/// Takes bytes as options and cells: learns from one grid and encodes another.
pub fn encode_any(bytes: &[u8]) {
    let Some((&[flags, k, alpha, height, width, merges], cells)) = bytes.split_first_chunk() else { return };
    let k = u32::from(k % 8);
    let options = TrainOptions {
        base_vocab_size: k,
        num_merges: merges.into(),
        merge_mode: if flags & 1 == 0 { MergeMode::Pair } else { MergeMode::Oriented },
        alpha: f64::from(alpha) / 64.0,
        min_frequency: u64::from(flags >> 1 & 3),
        num_threads: 1,
        ..TrainOptions::default()
    };
    let ids = || cells.iter().map(|&cell| u32::from(cell % 9));
    let (height, width) = (usize::from(height % 24), usize::from(width % 24));
    let rectangle = Grid::new(0, height, width, ids().cycle().take(height * width).collect());
    let row = Grid::new(1, 1, cells.len(), ids().collect());
    let grids: Vec<Grid> = [rectangle, row].into_iter().flatten().collect();
    let Ok(vocabulary) = train(&grids, &options, |_| (), &Interrupt::default()) else { return };
    let dropout = Dropout { probability: f64::from(flags >> 3 & 3) / 3.0, seed: merges.into() };
    for grid in &grids {
        round_trip(&vocabulary, grid, &EncodeOptions { regions: true, dropout: Some(dropout) });
    }
}

/// Decodes tokens that may be any numbers.
pub fn decode_any(vocabulary: &Vocabulary, ids: &[u32]) {
    for (height, width) in [(5, 6), (1, ids.len()), (usize::MAX, 2)] {
        if let Ok(grid) = vocabulary.decode(ids, height, width, None) {
            assert_eq!(grid.len(), height * width);
            assert!(grid.iter().all(|&id| id < vocabulary.base_vocab_size()));
        }
    }
}

fn round_trip(vocabulary: &Vocabulary, grid: &Grid, options: &EncodeOptions) {
    let encoding = Encoder::new(vocabulary).unwrap().encode(grid, options, &Interrupt::default()).unwrap();
    let (height, width) = (grid.height() as usize, grid.width() as usize);
    let ids = vocabulary.decode(&encoding.ids, height, width, encoding.regions.as_ref()).unwrap();
    assert_eq!(ids, grid.ids());
    if vocabulary.merge_mode() == MergeMode::Oriented {
        assert_eq!(vocabulary.decode(&encoding.ids, height, width, None).unwrap(), grid.ids());
    }
}
