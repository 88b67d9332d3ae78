//! Visual BPE written plainly from the specification: every merge counts all pairs again, and encoding applies all
//! merges. The core is compared with it.

use std::collections::BTreeMap;

use being_vl_core::{Grid, Merge, MergeMode, Offset, TrainOptions, Vocabulary};

/// One grid's regions: per cell the anchor's cell number, and per anchor the token.
#[derive(Clone)]
pub struct PlainGrid {
    height: usize,
    width: usize,
    anchor: Vec<usize>,
    token: Vec<u32>,
}

impl PlainGrid {
    pub fn new(grid: &Grid) -> Self {
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

    /// Applies one merge to the pairs as they stand before it.
    pub fn apply(&mut self, a: u32, b: u32, offset: Option<Offset>, token: u32) {
        let mut is_consumed = vec![false; self.anchor.len()];
        let mut new_anchor: Vec<usize> = (0..self.anchor.len()).collect();
        for (x, y) in self.pairs() {
            let matches = !is_consumed[x] && !is_consumed[y] && self.token[x] == a && self.token[y] == b;
            if matches && offset.is_none_or(|offset| offset == self.offset(x, y)) {
                (is_consumed[x], is_consumed[y]) = (true, true);
                self.token[x] = token;
                new_anchor[y] = x;
            }
        }
        self.anchor.iter_mut().for_each(|anchor| *anchor = new_anchor[*anchor]);
    }

    /// Applies all merges in the order learned.
    pub fn encode(grid: &Grid, vocabulary: &Vocabulary) -> Self {
        let mut plain_grid = Self::new(grid);
        for (token, merge) in (vocabulary.base_vocab_size()..).zip(vocabulary.merges()) {
            plain_grid.apply(merge.a, merge.b, merge.offset, token);
        }
        plain_grid
    }

    /// Tokens in raster order of anchors.
    pub fn tokens(&self) -> Vec<u32> {
        let anchors = self.anchor.iter().enumerate().filter(|&(cell, &anchor)| cell == anchor);
        anchors.map(|(cell, _)| self.token[cell]).collect()
    }

    /// Per cell, the index of its token in [`Self::tokens`].
    pub fn regions(&self) -> Vec<u32> {
        let mut index = vec![0; self.anchor.len()];
        let anchors = self.anchor.iter().enumerate().filter(|&(cell, &anchor)| cell == anchor);
        for (i, (cell, _)) in (0..).zip(anchors) {
            index[cell] = i;
        }
        self.anchor.iter().map(|&anchor| index[anchor]).collect()
    }
}

/// Learns merges; returns them and the grids' tokens after the last one.
pub fn train(grids: &[Grid], options: &TrainOptions) -> (Vec<Merge>, Vec<Vec<u32>>) {
    let mut states: Vec<PlainGrid> = grids.iter().map(PlainGrid::new).collect();
    let mut merges = Vec::new();
    while merges.len() < options.num_merges {
        let mut counts: BTreeMap<(u32, u32), BTreeMap<Offset, u64>> = BTreeMap::new();
        for state in &states {
            for (x, y) in state.pairs() {
                let pair = (state.token[x], state.token[y]);
                *counts.entry(pair).or_default().entry(state.offset(x, y)).or_default() += 1;
            }
        }
        let candidates: Vec<(u64, Merge)> = counts
            .into_iter()
            .map(|((a, b), histogram)| {
                let count: u64 = histogram.values().sum();
                let offset_count = *histogram.values().max().unwrap();
                let consistency = consistency(&histogram, options.sigma);
                let first = *histogram.iter().find(|(_, count)| **count == offset_count).unwrap().0;
                let (frequency, offset) = match options.merge_mode {
                    MergeMode::Pair => (count, None),
                    MergeMode::Oriented => (offset_count, Some(first)),
                };
                (frequency, Merge { a, b, offset, count, offset_count, consistency })
            })
            .filter(|(frequency, _)| *frequency >= options.min_frequency)
            .collect();
        let Some(max_frequency) = candidates.iter().map(|(frequency, _)| *frequency).max() else { break };
        let priority = |&(frequency, merge): &(u64, Merge)| {
            frequency as f64 / max_frequency as f64 + options.alpha * merge.consistency
        };
        // Candidates ascend by (a, b), so the first one of the highest priority wins ties.
        let mut winner = &candidates[0];
        for candidate in &candidates {
            if priority(candidate) > priority(winner) {
                winner = candidate;
            }
        }
        let merge = winner.1;
        let token = options.base_vocab_size + merges.len() as u32;
        for state in &mut states {
            state.apply(merge.a, merge.b, merge.offset, token);
        }
        merges.push(merge);
    }
    (merges, states.iter().map(PlainGrid::tokens).collect())
}

/// Section 2's S, with sums in ascending order of offsets.
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
