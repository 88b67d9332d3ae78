//! The core against a plain implementation that counts everything anew for every rule, and against itself.

use std::collections::BTreeMap;

use being_vl_core::{
    Dropout, EncodeOptions, Encoder, Error, Grid, Interrupt, MergeMode, Offset, TrainOptions, Vocabulary,
    train,
};
use proptest::prelude::*;

/// One grid's regions: per cell the anchor's cell number, and per anchor the token.
#[derive(Clone)]
struct Plain {
    height: usize,
    width: usize,
    anchor: Vec<usize>,
    token: Vec<u32>,
}

impl Plain {
    fn new(grid: &Grid) -> Self {
        let (height, width) = (grid.height() as usize, grid.width() as usize);
        Self { height, width, anchor: (0..height * width).collect(), token: grid.ids().to_vec() }
    }

    /// Adjacent regions as (x, y), in raster order.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for row in 0..self.height {
            for column in 0..self.width {
                let cell = row * self.width + column;
                let right = (column + 1 < self.width).then_some(cell + 1);
                let below = (row + 1 < self.height).then_some(cell + self.width);
                for other in [right, below].into_iter().flatten() {
                    let (p, q) = (self.anchor[cell], self.anchor[other]);
                    if p != q {
                        pairs.push((p.min(q), p.max(q)));
                    }
                }
            }
        }
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    }

    fn offset(&self, x: usize, y: usize) -> Offset {
        let place = |cell: usize| ((cell / self.width) as i32, (cell % self.width) as i32);
        Offset { dy: place(y).0 - place(x).0, dx: place(y).1 - place(x).1 }
    }

    fn apply(&mut self, a: u32, b: u32, offset: Option<Offset>, token: u32) {
        let mut consumed = vec![false; self.anchor.len()];
        for (x, y) in self.pairs() {
            let free = !consumed[x] && !consumed[y] && self.token[x] == a && self.token[y] == b;
            if free && offset.is_none_or(|offset| offset == self.offset(x, y)) {
                (consumed[x], consumed[y]) = (true, true);
                self.token[x] = token;
                self.anchor.iter_mut().filter(|anchor| **anchor == y).for_each(|anchor| *anchor = x);
            }
        }
    }

    fn tokens(&self) -> Vec<u32> {
        let anchors = self.anchor.iter().enumerate().filter(|&(cell, &anchor)| cell == anchor);
        anchors.map(|(cell, _)| self.token[cell]).collect()
    }
}

type PlainRule = (u32, u32, Option<Offset>, u64, u64, f64);

fn plain_train(grids: &[Grid], options: &TrainOptions) -> (Vec<PlainRule>, Vec<Vec<u32>>) {
    let mut states: Vec<Plain> = grids.iter().map(Plain::new).collect();
    let mut rules = Vec::new();
    while rules.len() < options.num_merges {
        let mut counts: BTreeMap<(u32, u32), BTreeMap<Offset, u64>> = BTreeMap::new();
        for state in &states {
            for (x, y) in state.pairs() {
                let pair = (state.token[x], state.token[y]);
                *counts.entry(pair).or_default().entry(state.offset(x, y)).or_default() += 1;
            }
        }
        let candidates: Vec<_> = counts
            .into_iter()
            .map(|((a, b), histogram)| {
                let n: u64 = histogram.values().sum();
                let n_offset = *histogram.values().max().unwrap();
                let offset = *histogram.iter().find(|(_, count)| **count == n_offset).unwrap().0;
                let f = if options.merge_mode == MergeMode::Pair { n } else { n_offset };
                (a, b, offset, n, n_offset, f, consistency(&histogram, options.sigma))
            })
            .filter(|candidate| candidate.5 >= options.min_frequency)
            .collect();
        let Some(most) = candidates.iter().map(|candidate| candidate.5).max() else { break };
        let priority = |f: u64, s: f64| f as f64 / most as f64 + options.alpha * s;
        let mut best = candidates[0];
        for &candidate in &candidates {
            if priority(candidate.5, candidate.6) > priority(best.5, best.6) {
                best = candidate;
            }
        }
        let (a, b, offset, n, n_offset, _, s) = best;
        let offset = (options.merge_mode == MergeMode::Oriented).then_some(offset);
        let token = options.base_vocab_size + rules.len() as u32;
        for state in &mut states {
            state.apply(a, b, offset, token);
        }
        rules.push((a, b, offset, n, n_offset, s));
    }
    (rules, states.iter().map(Plain::tokens).collect())
}

fn consistency(histogram: &BTreeMap<Offset, u64>, sigma: f64) -> f64 {
    let n = histogram.values().sum::<u64>() as f64;
    let mean = |part: fn(&Offset) -> i32| {
        histogram.iter().map(|(offset, &count)| count as f64 * f64::from(part(offset))).sum::<f64>() / n
    };
    let (mean_y, mean_x) = (mean(|offset| offset.dy), mean(|offset| offset.dx));
    let mut sum = 0.0;
    for (offset, &count) in histogram {
        let (y, x) = (f64::from(offset.dy) - mean_y, f64::from(offset.dx) - mean_x);
        sum += count as f64 * (-(y * y + x * x) / (2.0 * (sigma * sigma))).exp();
    }
    sum / n
}

fn learn(grids: &[Grid], options: &TrainOptions) -> Vocabulary {
    train(grids, options, |_| (), &Interrupt::default()).unwrap()
}

fn plain_rules(vocabulary: &Vocabulary) -> Vec<PlainRule> {
    let plain = |rule: &being_vl_core::Rule| {
        (rule.a, rule.b, rule.offset, rule.count, rule.offset_count, rule.consistency)
    };
    vocabulary.rules().iter().map(plain).collect()
}

/// Grids of one codebook: noise, or blobs of equal ids.
fn grids(k: u32, count: usize) -> impl Strategy<Value = Vec<Grid>> {
    let grid = (1..=12_usize, 1..=12_usize, any::<bool>()).prop_flat_map(move |(height, width, smooth)| {
        let cell = (0..k, any::<u8>());
        prop::collection::vec(cell, height * width).prop_map(move |cells| {
            let mut ids: Vec<u32> = Vec::new();
            for (cell, (id, chance)) in cells.into_iter().enumerate() {
                ids.push(match chance {
                    0..=100 if smooth && cell % width > 0 => ids[cell - 1],
                    101..=200 if smooth && cell >= width => ids[cell - width],
                    _ => id,
                });
            }
            Grid::new(0, height, width, ids).unwrap()
        })
    });
    prop::collection::vec(grid, 1..=count)
}

fn cases() -> impl Strategy<Value = (Vec<Grid>, TrainOptions)> {
    let options = (
        1..=6_u32,
        any::<bool>(),
        prop::sample::select(vec![0.0, 1e-9, 0.1, 0.3, 1.0, 5.0]),
        prop::sample::select(vec![0.3, 1.0, 4.0]),
        1..=4_u64,
        1..=3_usize,
        prop::sample::select(vec![1, 2, 5, 20, 20_000]),
        0..=60_usize,
    );
    options.prop_flat_map(
        |(k, oriented, alpha, sigma, min_frequency, num_threads, indexed_pairs, num_merges)| {
            let merge_mode = if oriented { MergeMode::Oriented } else { MergeMode::Pair };
            let options = TrainOptions {
                base_vocab_size: k,
                num_merges,
                merge_mode,
                alpha,
                sigma,
                min_frequency,
                num_threads,
                indexed_pairs,
                ..TrainOptions::default()
            };
            (grids(k, 8), Just(options))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Incremental training learns the same rules, with the same statistics, as counting anew every time, and encoding
    /// a training grid gives what became of it.
    #[test]
    fn training_equals_full_counts((grids, options) in cases()) {
        let (rules, states) = plain_train(&grids, &options);
        let vocabulary = learn(&grids, &options);
        prop_assert_eq!(plain_rules(&vocabulary), rules);
        let encoder = Encoder::new(&vocabulary);
        let encodings = encoder.encode_batch(&grids, &EncodeOptions::default(), 1, &Interrupt::default()).unwrap();
        let tokens: Vec<_> = encodings.into_iter().map(|encoding| encoding.ids).collect();
        prop_assert_eq!(tokens, states);
    }

    /// Encoding grids not seen in training in one pass equals applying rule after rule.
    #[test]
    fn encoding_equals_rule_after_rule((grids, options) in cases(), unseen in grids(1, 3)) {
        let vocabulary = learn(&grids, &options);
        let encoder = Encoder::new(&vocabulary);
        let others = grids.iter().take(1).chain(&unseen);
        for grid in others {
            let transposed = Grid::new(0, 1, grid.ids().len(), grid.ids().to_vec()).unwrap();
            for grid in [grid, &transposed] {
                let mut plain = Plain::new(grid);
                for (index, rule) in (0..).zip(vocabulary.rules()) {
                    plain.apply(rule.a, rule.b, rule.offset, options.base_vocab_size + index);
                }
                let encoding = encoder.encode(grid, &EncodeOptions::default(), &Interrupt::default()).unwrap();
                prop_assert_eq!(encoding.ids, plain.tokens());
            }
        }
    }

    /// Whatever was encoded, with dropout too, decodes to the grid: by regions in both modes, by ids in oriented mode.
    #[test]
    fn decoding_inverts_encoding((grids, options) in cases(), probability in 0.0..=1.0, seed in any::<u64>()) {
        let vocabulary = learn(&grids, &options);
        let encoder = Encoder::new(&vocabulary);
        let options = EncodeOptions { dropout: Some(Dropout { probability, seed }), regions: true };
        for grid in &grids {
            let encoding = encoder.encode(grid, &options, &Interrupt::default()).unwrap();
            let (height, width) = (grid.height() as usize, grid.width() as usize);
            let decoded = vocabulary.decode(&encoding.ids, height, width, encoding.regions.as_ref()).unwrap();
            prop_assert_eq!(decoded.as_slice(), grid.ids());
            match vocabulary.decode(&encoding.ids, height, width, None) {
                Ok(decoded) => prop_assert_eq!(decoded.as_slice(), grid.ids()),
                Err(error) => {
                    prop_assert_eq!(vocabulary.merge_mode(), MergeMode::Pair);
                    prop_assert!(matches!(error, Error::Regions(_)));
                }
            }
        }
    }

    /// A file gives back the vocabulary that made it.
    #[test]
    fn json_keeps_everything((grids, options) in cases()) {
        let vocabulary = learn(&grids, &options);
        prop_assert_eq!(Vocabulary::from_json(&vocabulary.to_json().unwrap()).unwrap(), vocabulary);
    }

    /// Damaged files are refused or harmless, never a panic.
    #[test]
    fn damaged_json_is_no_panic((grids, options) in cases(), place in any::<prop::sample::Index>(), byte in 32..127_u8) {
        let mut text = learn(&grids, &options).to_json().unwrap().into_bytes();
        let place = place.index(text.len());
        text[place] = byte;
        if let Ok(vocabulary) = Vocabulary::from_json(&String::from_utf8(text).unwrap()) {
            let grid = Grid::new(0, 2, 2, vec![0; 4]).unwrap();
            let encoding = Encoder::new(&vocabulary).encode(&grid, &EncodeOptions::default(), &Interrupt::default());
            let ids = encoding.unwrap().ids;
            if vocabulary.merge_mode() == MergeMode::Oriented {
                prop_assert_eq!(vocabulary.decode(&ids, 2, 2, None).unwrap(), vec![0; 4]);
            }
        }
    }

    /// Any tokens at all are decoded or refused, never a panic.
    #[test]
    fn any_tokens_are_no_panic((grids, options) in cases(), ids in prop::collection::vec(0..80_u32, 0..40)) {
        let vocabulary = learn(&grids, &options);
        if let Ok(grid) = vocabulary.decode(&ids, 5, 6, None) {
            prop_assert_eq!(grid.len(), 30);
        }
    }
}
