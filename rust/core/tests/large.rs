//! The largest numbers that a user may come with: tokens past 2^20, in both modes.

use std::fmt::Write;

use being_vl_core::{EncodeOptions, Encoder, Grid, Interrupt, Vocabulary};

const K: u32 = 1 << 20;

/// Ids in a row, which become one token.
const ROW: u32 = 1 << 15;

/// 2^20 merges over 2^20 ids: (i, i + 1) for every even id i, then pairs of what these made, and so on to tokens of
/// `ROW` cells; and (i, i) for the first ids.
fn vocabulary(oriented: bool) -> Vocabulary {
    let mode = if oriented { "oriented" } else { "pair" };
    let mut text = format!(
        r#"{{"format": "being-vl/visual-bpe", "version": 1, "base_vocab_size": {K}, "merge_mode": "{mode}", "alpha": 0,
        "sigma": 1, "min_frequency": 1, "quantizer": {{"name": null, "fingerprint": null}}, "num_grids": 1,
        "grid_sizes": [{{"height": 1024, "width": 1024, "grids": 1}}], "num_merges": {K}, "merges": ["#
    );
    // All tokens of a size.
    let (mut tokens, mut size, mut merges) = ((0..K).collect::<Vec<_>>(), 1, Vec::new());
    while size < ROW {
        let join = |pair: &[u32]| {
            merges.push((pair[0], pair[1], size));
            K + merges.len() as u32 - 1
        };
        tokens = tokens.chunks_exact(2).map(join).collect();
        size *= 2;
    }
    merges.extend((0..K - merges.len() as u32).map(|id| (id, id, 1)));
    for (index, (a, b, size)) in merges.into_iter().enumerate() {
        let offset = if oriented { format!(r#""dy": 0, "dx": {size}, "#) } else { String::new() };
        let comma = if index == 0 { "" } else { "," };
        write!(text, r#"{comma}{{"a": {a}, "b": {b}, {offset}"n": 1, "n_offset": 1, "s": 1}}"#).unwrap();
    }
    Vocabulary::from_json(&(text + "]}")).unwrap()
}

#[test]
fn a_million_ids_and_a_million_merges() {
    for oriented in [false, true] {
        let vocabulary = vocabulary(oriented);
        assert_eq!(vocabulary.vocab_size(), 2 * K);
        let encoder = Encoder::new(&vocabulary).unwrap();
        // Every id, row after row; then the last merge, and ids that nothing joins.
        let rows = (0..K / ROW).map(|row| (row * ROW..(row + 1) * ROW).collect::<Vec<_>>());
        let first_of_rows: u32 = K + (1..15).map(|level| K >> level).sum::<u32>();
        let mut expected: Vec<Vec<u32>> = (0..K / ROW).map(|row| vec![first_of_rows + row]).collect();
        expected.push(vec![2 * K - 1, 5, K - 1]);
        for (ids, expected) in rows.chain([vec![31, 31, 5, K - 1]]).zip(expected) {
            let width = ids.len();
            let grid = Grid::new(0, 1, width, ids).unwrap();
            let options = EncodeOptions { regions: true, ..EncodeOptions::default() };
            let encoding = encoder.encode(&grid, &options, &Interrupt::default()).unwrap();
            assert_eq!(encoding.ids, expected);
            let regions = encoding.regions.as_ref();
            assert_eq!(vocabulary.decode(&encoding.ids, 1, width, regions).unwrap(), grid.ids());
            if oriented {
                assert_eq!(vocabulary.decode(&encoding.ids, 1, width, None).unwrap(), grid.ids());
            }
        }
    }
}
