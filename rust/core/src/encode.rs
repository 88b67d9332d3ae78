//! Encoding: a grid's ids become tokens by the rules in the order learned.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::interrupt::Interrupt;
use crate::region::{BORDER, Canvas};
use crate::rules::RuleTable;
use crate::threads::Threads;
use crate::vocabulary::Vocabulary;

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
    /// Per rule, its pair.
    pairs: Vec<(u32, u32)>,
    table: RuleTable,
    /// Per token, whether any rule uses it.
    used: Vec<bool>,
    /// Per rule, the number of cells that its token covers.
    sizes: Vec<u64>,
}

impl Encoder {
    /// Makes a vocabulary ready for encoding.
    #[must_use]
    pub fn new(vocabulary: &Vocabulary) -> Self {
        let mut used = vec![false; vocabulary.vocab_size() as usize];
        for rule in vocabulary.rules() {
            used[rule.a as usize] = true;
            used[rule.b as usize] = true;
        }
        Self {
            base_vocab_size: vocabulary.base_vocab_size(),
            pairs: vocabulary.rules().iter().map(|rule| (rule.a, rule.b)).collect(),
            table: RuleTable::new(vocabulary),
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
    queue: Queue,
    /// The candidates of one rule.
    batch: Vec<Candidate>,
    neighbours: Vec<u32>,
}

/// Two adjacent regions that a rule joins, as anchors. They stand for the tokens that the regions had then.
type Candidate = (u32, u32);

/// Candidates by rule. Rules are taken in order; a rule's token appears in later rules only, so while a rule is being
/// applied no candidate comes in for it or for an earlier one. That makes one pass equal to applying rule after rule.
#[derive(Default)]
struct Queue {
    /// Per rule, its last entry in the list below.
    last: Vec<u32>,
    /// Candidates, each with the entry of its rule before it.
    entries: Vec<(Candidate, u32)>,
    /// One bit per rule that has candidates.
    waiting: Vec<u64>,
}

/// No entry.
const NONE: u32 = u32::MAX;

impl Queue {
    fn reset(&mut self, rules: usize) {
        self.entries.clear();
        self.last.resize(rules, NONE);
        self.waiting.resize(rules.div_ceil(64), 0);
    }

    #[inline]
    fn push(&mut self, rule: u32, candidate: Candidate) {
        let entry = self.entries.len() as u32;
        let before = std::mem::replace(&mut self.last[rule as usize], entry);
        self.entries.push((candidate, before));
        self.waiting[rule as usize / 64] |= 1 << (rule % 64);
    }

    /// The first rule with candidates from a word of `waiting` on; moves `word` there, and the candidates to `batch` in
    /// raster order.
    fn pop(&mut self, word: &mut usize, batch: &mut Vec<Candidate>) -> Option<u32> {
        *word += self.waiting[*word..].iter().position(|&bits| bits != 0)?;
        let bits = &mut self.waiting[*word];
        let rule = *word as u32 * 64 + bits.trailing_zeros();
        *bits &= *bits - 1;
        batch.clear();
        let mut entry = std::mem::replace(&mut self.last[rule as usize], NONE);
        while entry != NONE {
            let (candidate, before) = self.entries[entry as usize];
            batch.push(candidate);
            entry = before;
        }
        batch.sort_unstable();
        Some(rule)
    }
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
        let result = self.try_encode(encoder, grid, index, options, interrupt);
        if result.is_err() {
            *self = Self::default();
        }
        result
    }

    fn try_encode(
        &mut self,
        encoder: &Encoder,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
    ) -> Result<Encoding> {
        let Self { canvas, queue, batch, neighbours } = self;
        canvas.clear();
        canvas.push(grid);
        queue.reset(encoder.pairs.len());
        let stride = grid.width() + 1;
        let mut leaves = options.regions.then(|| vec![0; canvas.len()]);

        for (step, x) in canvas.anchors().enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            for y in canvas.right_and_below(x, stride) {
                if y != BORDER {
                    encoder.enqueue(queue, canvas, x, y);
                }
            }
        }
        let mut steps = 0;
        let mut word = 0;
        while let Some(rule) = queue.pop(&mut word, batch) {
            let (a, b) = encoder.pairs[rule as usize];
            let size = encoder.size(a);
            let token = encoder.base_vocab_size + rule;
            for &(x, y) in &*batch {
                steps += 1;
                if steps % CHECK_INTERVAL == 0 {
                    interrupt.check()?;
                }
                if canvas.token_at(x) != Some(a) || canvas.token_at(y) != Some(b) {
                    continue;
                }
                if let Some(dropout) = options.dropout
                    && dropout.skips(index, rule, grid_position(x, stride), grid_position(y, stride))
                {
                    continue;
                }
                match &mut leaves {
                    Some(leaves) => canvas.merge(x, y, token, |p| leaves[p as usize] += size),
                    None => canvas.merge(x, y, token, |_| ()),
                }
                if encoder.used[token as usize] {
                    neighbours.clear();
                    canvas.neighbours(x, neighbours);
                    for &z in &*neighbours {
                        encoder.enqueue(queue, canvas, x.min(z), x.max(z));
                    }
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

    /// Notes two adjacent regions if a rule joins them.
    #[inline]
    fn enqueue(&self, queue: &mut Queue, canvas: &Canvas, x: u32, y: u32) {
        let (a, b) = (canvas.token(x), canvas.token(y));
        if self.used[a as usize]
            && self.used[b as usize]
            && let Some(rule) = self.table.get(a, b, || canvas.offset(x, y))
        {
            queue.push(rule, (x, y));
        }
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
