//! Encoding: a grid's ids become tokens by the rules in the order learned.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::error::{Error, Result};
use crate::grid::{Grid, Offset};
use crate::interrupt::Interrupt;
use crate::region::{BORDER, Canvas};
use crate::statistics::key;
use crate::threads::Threads;
use crate::vocabulary::{MergeMode, Vocabulary};

/// Below this many cells a batch is encoded on the calling thread.
const PARALLEL_CELLS: usize = 1 << 15;

/// Work between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 14;

/// BPE-dropout: every candidate merge is skipped with some probability (Provilkov et al. 2020).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of skipping a merge, in 0 to 1.
    pub probability: f64,
    /// Same seed, same merges. Grid `i` of a batch uses `seed + i`.
    pub seed: u64,
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EncodeOptions {
    /// Merges to leave out at random.
    pub dropout: Option<Dropout>,
    /// Whether to return which token covers which cell.
    pub regions: bool,
}

/// Which token covers which cell, in raster order of cells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Regions {
    /// Per cell, the index of its token in the output sequence.
    pub tokens: Vec<u32>,
    /// Per cell, which of its token's leaves it is: leaves are a token's ids, those of `a` before those of `b`.
    pub leaves: Vec<u32>,
}

/// What a grid became.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoding {
    /// The tokens in raster order of their regions' anchors.
    pub ids: Vec<u32>,
    /// Which token covers which cell, if asked for.
    pub regions: Option<Regions>,
}

/// A vocabulary made ready for encoding.
#[derive(Debug)]
pub struct Encoder {
    base_vocab_size: u32,
    merge_mode: MergeMode,
    /// Per rule, its pair.
    pairs: Vec<(u32, u32)>,
    /// From (a, b, offset) to the rule; in pair mode the offset is always `ANY`.
    rules: FxHashMap<(u64, Offset), u32>,
    /// Per token, whether any rule uses it.
    used: Vec<bool>,
    /// Per rule, the number of cells that its token covers.
    sizes: Vec<u64>,
}

/// Stands for every offset, in pair mode.
const ANY: Offset = Offset { dy: 0, dx: 0 };

impl Encoder {
    /// Makes a vocabulary ready for encoding.
    #[must_use]
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let mut used = vec![false; vocabulary.vocab_size() as usize];
        let mut rules = FxHashMap::default();
        for (index, rule) in (0..).zip(vocabulary.rules()) {
            used[rule.a as usize] = true;
            used[rule.b as usize] = true;
            rules.insert((key(rule.a, rule.b), rule.offset.unwrap_or(ANY)), index);
        }
        Self {
            base_vocab_size: vocabulary.base_vocab_size(),
            merge_mode: vocabulary.merge_mode(),
            pairs: vocabulary.rules().iter().map(|rule| (rule.a, rule.b)).collect(),
            rules,
            used,
            sizes: vocabulary.merged_sizes(),
        }
    }

    /// Encodes one grid.
    ///
    /// # Errors
    /// [`Error::GridId`] for an id that is not in the codebook, [`Error::Option`] for a bad probability,
    /// [`Error::Interrupted`] if asked to stop.
    pub fn encode(&self, grid: &Grid, options: &EncodeOptions, interrupt: &Interrupt) -> Result<Encoding> {
        self.check(std::slice::from_ref(grid), options)?;
        Workspace::default().encode(self, grid, 0, options, interrupt)
    }

    /// Encodes many grids, on all threads if there is enough to do. `num_threads` 0 means all cores.
    ///
    /// # Errors
    /// As [`Encoder::encode`], and [`Error::Threads`] if threads cannot be started.
    pub fn encode_batch(
        &self,
        grids: &[Grid],
        options: &EncodeOptions,
        num_threads: usize,
        interrupt: &Interrupt,
    ) -> Result<Vec<Encoding>> {
        self.check(grids, options)?;
        let cells: usize = grids.iter().map(|grid| grid.ids().len()).sum();
        let threads = Threads::new(if cells < PARALLEL_CELLS { 1 } else { num_threads })?;
        let encode = |workspace: &mut Workspace, (index, grid): (usize, &Grid)| {
            interrupt.check()?;
            workspace.encode(self, grid, index as u64, options, interrupt)
        };
        match threads.pool() {
            None => {
                let mut workspace = Workspace::default();
                grids.iter().enumerate().map(|item| encode(&mut workspace, item)).collect()
            }
            Some(pool) => {
                pool.install(|| grids.par_iter().enumerate().map_init(Workspace::default, encode).collect())
            }
        }
    }

    fn check(&self, grids: &[Grid], options: &EncodeOptions) -> Result<()> {
        if let Some(Dropout { probability, .. }) = options.dropout
            && !(0.0..=1.0).contains(&probability)
        {
            let value = probability.to_string();
            return Err(Error::Option { name: "dropout", value, expected: "a probability, 0 to 1" });
        }
        let check = |(index, grid): (usize, &Grid)| grid.check_ids(index, self.base_vocab_size);
        grids.iter().enumerate().try_for_each(check)
    }
}

/// What encoding one grid needs, kept from grid to grid.
#[derive(Default)]
struct Workspace {
    canvas: Canvas,
    /// Candidates (rule, anchor of x, anchor of y); the least is merged first, which equals applying rule after rule,
    /// since a rule's token appears in later rules only.
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
    neighbours: Vec<u32>,
}

impl Workspace {
    fn encode(
        &mut self,
        encoder: &Encoder,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
    ) -> Result<Encoding> {
        let Self { canvas, queue, neighbours } = self;
        canvas.clear();
        canvas.push(grid);
        queue.clear();
        let stride = grid.width() + 1;
        let mut leaves = options.regions.then(|| vec![0; canvas.len()]);

        for (step, x) in canvas.anchors().enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            for y in canvas.right_and_below(x, stride) {
                if y != BORDER {
                    queue.extend(encoder.candidate(canvas, x, y));
                }
            }
        }
        let mut steps = 0;
        while let Some(Reverse((rule, x, y))) = queue.pop() {
            steps += 1;
            if steps % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let (a, b) = encoder.pairs[rule as usize];
            if canvas.token_at(x) != Some(a) || canvas.token_at(y) != Some(b) {
                continue;
            }
            if let Some(dropout) = options.dropout
                && dropout.skips(index, rule, grid_position(x, stride), grid_position(y, stride))
            {
                continue;
            }
            let size = encoder.size(a);
            let token = encoder.base_vocab_size + rule;
            match &mut leaves {
                Some(leaves) => canvas.merge(x, y, token, |p| leaves[p as usize] += size),
                None => canvas.merge(x, y, token, |_| ()),
            }
            if encoder.used[token as usize] {
                neighbours.clear();
                canvas.neighbours(x, neighbours);
                for &z in neighbours.iter() {
                    queue.extend(encoder.candidate(canvas, x.min(z), x.max(z)));
                }
            }
        }
        let ids = canvas.anchors().map(|anchor| canvas.token(anchor)).collect();
        Ok(Encoding { ids, regions: leaves.map(|leaves| regions(canvas, &leaves)) })
    }
}

impl Encoder {
    /// The number of cells that a token covers, if a grid has that many.
    fn size(&self, token: u32) -> u32 {
        token.checked_sub(self.base_vocab_size).map_or(1, |rule| self.sizes[rule as usize] as u32)
    }

    /// The queue's entry for two adjacent regions, if a rule joins them.
    fn candidate(&self, canvas: &Canvas, x: u32, y: u32) -> Option<Reverse<(u32, u32, u32)>> {
        let (a, b) = (canvas.token(x), canvas.token(y));
        if !self.used[a as usize] || !self.used[b as usize] {
            return None;
        }
        let offset = match self.merge_mode {
            MergeMode::Pair => ANY,
            MergeMode::Oriented => canvas.offset(x, y),
        };
        self.rules.get(&(key(a, b), offset)).map(|&rule| Reverse((rule, x, y)))
    }
}

impl Dropout {
    /// Whether grid `index` skips this candidate; a coin that depends on nothing but its arguments.
    ///
    /// `x` and `y` are the anchors' cells in raster order, counted from 0.
    fn skips(self, index: u64, rule: u32, x: u32, y: u32) -> bool {
        let seed = mix(self.seed.wrapping_add(index));
        let hash = [rule, x, y].into_iter().fold(seed, |hash, part| mix(hash ^ u64::from(part)));
        let uniform = (hash >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < self.probability
    }
}

/// One step of the generator `SplitMix64`.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The number of a cell in raster order, given its position on a canvas of one grid.
fn grid_position(position: u32, stride: u32) -> u32 {
    let (row, column) = (position / stride - 1, position % stride);
    row * (stride - 1) + column
}

fn regions(canvas: &Canvas, leaves: &[u32]) -> Regions {
    let mut index_of = vec![0; canvas.len()];
    for (index, anchor) in (0..).zip(canvas.anchors()) {
        index_of[anchor as usize] = index;
    }
    let covered = (0..).zip(leaves).filter(|&(p, _)| canvas.anchor(p) != BORDER);
    let (tokens, leaves) = covered.map(|(p, &leaf)| (index_of[canvas.anchor(p) as usize], leaf)).unzip();
    Regions { tokens, leaves }
}
