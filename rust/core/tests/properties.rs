//! The core against a plain implementation that counts everything again for every merge, and against itself.

mod plain;

use being_vl_core::{
    Dropout, EncodeOptions, Encoder, Encoding, Error, Grid, Interrupt, MAX_SIDE, MergeMode, TrainOptions,
    Trainer, Vocabulary, train,
};
use plain::PlainGrid;
use proptest::prelude::*;

fn learn(grids: &[Grid], options: &TrainOptions) -> Vocabulary {
    train(grids, options, |_| (), &Interrupt::default()).unwrap()
}

/// Learns up to each of `limits` merges, going on from a vocabulary if there is one.
fn learn_from(
    grids: &[Grid],
    options: &TrainOptions,
    resume: Option<&Vocabulary>,
    limits: &[usize],
) -> Vocabulary {
    let sizes: Vec<_> = grids.iter().map(|grid| (grid.height() as usize, grid.width() as usize)).collect();
    let mut trainer = Trainer::new(&sizes, options.clone(), resume).unwrap();
    trainer.set_grids(0, grids).unwrap();
    for &limit in limits {
        trainer.run(limit, |_| (), &Interrupt::default()).unwrap();
    }
    trainer.vocabulary().unwrap()
}

fn encode(vocabulary: &Vocabulary, grids: &[Grid], num_threads: usize) -> Vec<Vec<u32>> {
    let encoder = Encoder::new(vocabulary).unwrap();
    let options = EncodeOptions::default();
    let encodings = encoder.encode_batch(grids, &options, num_threads, &Interrupt::default()).unwrap();
    encodings.iter().map(<[u32]>::to_vec).collect()
}

fn encode_with(vocabulary: &Vocabulary, grid: &Grid, options: &EncodeOptions) -> Encoding {
    Encoder::new(vocabulary).unwrap().encode(grid, options, &Interrupt::default()).unwrap()
}

/// Height and width: mostly small, some of up to 40×40, some of a single row or column.
fn sizes() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![
        6 => (1..=7_usize, 1..=7_usize),
        3 => (1..=14_usize, 1..=14_usize),
        1 => (20..=40_usize, 20..=40_usize),
        1 => (1..=1_usize, 1..=60_usize),
        1 => (1..=60_usize, 1..=1_usize),
    ]
}

/// How a grid's ids lie.
#[derive(Debug, Clone, Copy)]
enum Texture {
    Noise,
    /// Blobs: many cells repeat the cell at the left or above.
    Smooth,
    Blank,
    Rows,
    Columns,
    Checkered,
}

/// A grid of ids 0, scale, 2·scale, … (k of them).
fn grid(k: u32, scale: u32) -> impl Strategy<Value = Grid> {
    let texture = prop_oneof![
        3 => Just(Texture::Noise),
        4 => Just(Texture::Smooth),
        1 => Just(Texture::Blank),
        1 => Just(Texture::Rows),
        1 => Just(Texture::Columns),
        1 => Just(Texture::Checkered),
    ];
    (sizes(), texture).prop_flat_map(move |((height, width), texture)| {
        let cell = (0..k, any::<u8>());
        prop::collection::vec(cell, height * width).prop_map(move |cells| {
            let mut ids: Vec<u32> = Vec::new();
            for (cell, &(id, chance)) in cells.iter().enumerate() {
                let (row, column) = (cell / width, cell % width);
                ids.push(match texture {
                    Texture::Smooth if chance <= 100 && column > 0 => ids[cell - 1],
                    Texture::Smooth if chance > 155 && row > 0 => ids[cell - width],
                    Texture::Noise | Texture::Smooth => id * scale,
                    Texture::Blank => cells[0].0 * scale,
                    Texture::Rows => cells[row * width].0 * scale,
                    Texture::Columns => cells[column].0 * scale,
                    Texture::Checkered => cells[(row + column) % 2 % cells.len()].0 * scale,
                });
            }
            Grid::new(0, height, width, ids).unwrap()
        })
    })
}

/// Options, grids to learn from, and grids to encode.
fn cases() -> impl Strategy<Value = (TrainOptions, Vec<Grid>, Vec<Grid>)> {
    let codebook = prop_oneof![
        12 => (1..=6_u32, Just(1)),
        2 => (20..=40_u32, Just(1)),
        1 => (2..=4_u32, Just(40_000)), // tokens beyond 16 bits
    ];
    let options = (
        codebook,
        any::<bool>(),
        prop::sample::select(vec![0.0, 1e-9, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0]),
        prop::sample::select(vec![0.3, 1.0, 4.0]),
        1..=4_u64,
        1..=4_usize,
        prop::sample::select(vec![1, 2, 5, 20, 20_000]),
        prop_oneof![4 => 0..=60_usize, 1 => Just(400)],
    );
    options.prop_flat_map(
        |((k, scale), oriented, alpha, sigma, min_frequency, num_threads, indexed_pairs, num_merges)| {
            let merge_mode = if oriented { MergeMode::Oriented } else { MergeMode::Pair };
            let options = TrainOptions {
                base_vocab_size: k * scale,
                num_merges,
                merge_mode,
                alpha,
                sigma,
                min_frequency,
                num_threads,
                indexed_pairs,
                ..TrainOptions::default()
            };
            let grids = |sizes| prop::collection::vec(grid(k, scale), sizes);
            (Just(options), grids(1..=8), grids(1..=3))
        },
    )
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(3000))]

    /// Incremental training learns the same merges, with the same statistics, as counting again every time, and encoding
    /// a training grid gives what became of it.
    #[test]
    fn training_equals_full_counts((options, grids, _) in cases()) {
        let (merges, states) = plain::train(&grids, &options);
        let vocabulary = learn(&grids, &options);
        prop_assert_eq!(vocabulary.merges(), merges);
        prop_assert_eq!(encode(&vocabulary, &grids, options.num_threads), states);
    }
}

proptest! {
    #![proptest_config(config(1000))]

    /// Encoding grids not seen in training in one pass equals applying merge after merge, regions too.
    #[test]
    fn encoding_equals_merge_after_merge((options, grids, new_grids) in cases()) {
        let vocabulary = learn(&grids, &options);
        let row = Grid::new(0, 1, new_grids[0].ids().len(), new_grids[0].ids().to_vec()).unwrap();
        for grid in new_grids.iter().chain([&row]) {
            let plain_grid = PlainGrid::encode(grid, &vocabulary);
            let encoding = encode_with(&vocabulary, grid, &EncodeOptions { regions: true, dropout: None });
            prop_assert_eq!(&encoding.ids, &plain_grid.tokens());
            prop_assert_eq!(encoding.regions.unwrap().tokens, plain_grid.regions());
            prop_assert_eq!(encode_with(&vocabulary, grid, &EncodeOptions::default()).ids, encoding.ids);
        }
    }

    /// Neither the order of the grids nor the number of threads changes anything, and fewer merges are the first ones.
    #[test]
    fn order_threads_and_number_of_merges((options, grids, _) in cases(), seed in any::<u64>(), fewer in 0.0..1.0) {
        let vocabulary = learn(&grids, &options);
        let mut shuffled_grids = grids;
        for i in (1..shuffled_grids.len()).rev() {
            shuffled_grids.swap(i, (seed.rotate_left(i as u32 * 8) % (i as u64 + 1)) as usize);
        }
        for num_threads in 1..=4 {
            let options = TrainOptions { num_threads, ..options.clone() };
            prop_assert_eq!(&learn(&shuffled_grids, &options), &vocabulary);
        }
        let num_merges = (fewer * vocabulary.merges().len() as f64) as usize;
        let first = learn(&shuffled_grids, &TrainOptions { num_merges, ..options });
        prop_assert_eq!(first.merges(), &vocabulary.merges()[..num_merges]);
    }

    /// Training that is stopped and resumed, by other numbers of threads, ends where uninterrupted training ends.
    #[test]
    fn resumed_training((options, grids, _) in cases(), one in 0.0..1.0, two in 0.0..1.0, num_threads in 1..=4_usize) {
        let expected = learn(&grids, &options);
        let first = (one * expected.merges().len() as f64) as usize;
        let second = first + (two * (expected.merges().len() - first) as f64) as usize;
        let part = learn_from(&grids, &options, None, &[first / 2, first]);
        prop_assert_eq!(part.merges(), &expected.merges()[..first]);
        let options = TrainOptions { num_threads, ..options };
        prop_assert_eq!(learn_from(&grids, &options, Some(&part), &[second, usize::MAX]), expected);
    }

    /// Whatever was encoded, with dropout too, decodes to the grid: by regions in both modes, by ids in oriented mode.
    #[test]
    fn decoding_inverts_encoding(
        (options, grids, new_grids) in cases(),
        probability in prop_oneof![Just(0.0), 0.0..=1.0],
        seed in any::<u64>(),
    ) {
        let vocabulary = learn(&grids, &options);
        let options = EncodeOptions { dropout: Some(Dropout { probability, seed }), regions: true };
        for grid in grids.iter().chain(&new_grids) {
            let encoding = encode_with(&vocabulary, grid, &options);
            let (height, width) = (grid.height() as usize, grid.width() as usize);
            let ids = vocabulary.decode(&encoding.ids, height, width, encoding.regions.as_ref()).unwrap();
            prop_assert_eq!(ids.as_slice(), grid.ids());
            match vocabulary.decode(&encoding.ids, height, width, None) {
                Ok(ids) => prop_assert_eq!(ids.as_slice(), grid.ids()),
                Err(error) => {
                    prop_assert_eq!(vocabulary.merge_mode(), MergeMode::Pair);
                    prop_assert!(matches!(error, Error::Regions(_)));
                }
            }
        }
    }
}

/// Positions at the limits: rows and columns as long as a side may be, offsets as far, many and few tokens; the most
/// tokens are too many for the trainer's words of 64 bits.
#[test]
fn longest_sides() {
    let sizes = [(1, MAX_SIDE), (MAX_SIDE, 1), (2, MAX_SIDE), (MAX_SIDE, 2)];
    for (base_vocab_size, (height, width)) in
        [2, 1 << 20, 1 << 21].into_iter().flat_map(|k| sizes.map(|size| (k, size)))
    {
        // Long runs of one id among short ones, so that regions grow long.
        let id = |cell: usize| cell % 1009 < 7 || (cell * cell) % 11 == 3;
        let ids = (0..height * width).map(|cell| u32::from(id(cell)) * (base_vocab_size - 1)).collect();
        let grid = [Grid::new(0, height, width, ids).unwrap()];
        for merge_mode in [MergeMode::Pair, MergeMode::Oriented] {
            let options = TrainOptions {
                base_vocab_size,
                num_merges: 25,
                merge_mode,
                num_threads: 1,
                ..TrainOptions::default()
            };
            let (merges, states) = plain::train(&grid, &options);
            let vocabulary = learn(&grid, &options);
            assert_eq!(vocabulary.merges(), merges, "{height}x{width} {merge_mode:?} {base_vocab_size}");
            assert_eq!(encode(&vocabulary, &grid, 1), states);
        }
    }
}

/// A region that grows to cover most of a blank grid.
#[test]
fn blank_grid_becomes_few_regions() {
    for merge_mode in [MergeMode::Pair, MergeMode::Oriented] {
        let grid = [Grid::new(0, 64, 61, vec![0; 64 * 61]).unwrap()];
        let options = TrainOptions {
            base_vocab_size: 1,
            num_merges: 1000,
            merge_mode,
            min_frequency: 1,
            num_threads: 1,
            ..TrainOptions::default()
        };
        let (merges, states) = plain::train(&grid, &options);
        let vocabulary = learn(&grid, &options);
        assert_eq!(vocabulary.merges(), merges);
        assert_eq!(encode(&vocabulary, &grid, 1), states);
        assert_eq!(states[0].len(), 1);
    }
}
