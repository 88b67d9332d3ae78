//! Encoding: a grid's ids become tokens by the rules in the order learned.

mod merges;
mod workspace;

use std::cell::RefCell;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::interrupt::Interrupt;
use crate::threads::Threads;
use crate::vocabulary::Vocabulary;
use merges::Rules;
use workspace::Sheet;

/// Below this many cells a batch is encoded on the calling thread.
const PARALLEL_CELLS: usize = 1 << 15;

/// Grids that a thread encodes at a time, at most.
const CHUNK: usize = 64;

/// Sheets of more positions than this are not kept.
const KEPT_POSITIONS: usize = 1 << 20;

thread_local! {
    // Per thread and not per encoder, so that no lock is needed, which a fork could leave locked.
    static SHEET: RefCell<Sheet> = RefCell::default();
}

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

/// What many grids became.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodedBatch {
    /// The tokens of grid 0, then those of grid 1, and so on.
    pub values: Vec<u32>,
    /// Per grid, the number of its tokens.
    pub lengths: Vec<usize>,
    /// Per grid, which token covers which cell, if asked for.
    pub regions: Vec<Regions>,
}

impl EncodedBatch {
    /// The tokens of grid after grid.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = self.values.as_slice();
        self.lengths.iter().map(move |&length| {
            let (ids, after) = rest.split_at(length);
            rest = after;
            ids
        })
    }

    /// Puts another batch after this one.
    pub fn append(&mut self, mut other: Self) {
        self.values.append(&mut other.values);
        self.lengths.append(&mut other.lengths);
        self.regions.append(&mut other.regions);
    }
}

/// A vocabulary made ready for encoding.
#[derive(Debug)]
pub struct Encoder {
    rules: Rules,
}

impl Encoder {
    /// Makes a vocabulary ready for encoding.
    #[must_use]
    pub fn new(vocabulary: &Vocabulary) -> Self {
        Self { rules: Rules::new(vocabulary) }
    }

    /// Encodes one grid.
    ///
    /// # Errors
    /// [`Error::GridId`] for an id that is not in the codebook, [`Error::Option`] for a bad probability,
    /// [`Error::Interrupted`] if asked to stop.
    pub fn encode(&self, grid: &Grid, options: &EncodeOptions, interrupt: &Interrupt) -> Result<Encoding> {
        let grids = std::slice::from_ref(grid);
        self.check(grids, options)?;
        let EncodedBatch { values, mut regions, .. } = self.encode_chunk(0, grids, options, interrupt)?;
        Ok(Encoding { ids: values, regions: regions.pop() })
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
    ) -> Result<EncodedBatch> {
        self.check(grids, options)?;
        let cells: usize = grids.iter().map(|grid| grid.ids().len()).sum();
        let threads = Threads::new(if cells < PARALLEL_CELLS { 1 } else { num_threads })?;
        let Some(pool) = threads.pool() else {
            return self.encode_chunk(0, grids, options, interrupt);
        };
        let size = grids.len().div_ceil(threads.count() * 8).min(CHUNK);
        let encode = |(chunk, grids)| self.encode_chunk(chunk * size, grids, options, interrupt);
        let parts: Result<Vec<_>> = pool.install(|| grids.par_chunks(size).enumerate().map(encode).collect());
        let mut batch = EncodedBatch::default();
        parts?.into_iter().for_each(|part| batch.append(part));
        Ok(batch)
    }

    /// Encodes grids on this thread; the first of them is grid `first` of the batch.
    fn encode_chunk(
        &self,
        first: usize,
        grids: &[Grid],
        options: &EncodeOptions,
        interrupt: &Interrupt,
    ) -> Result<EncodedBatch> {
        SHEET.with_borrow_mut(|kept| {
            // Lost if there is an error.
            let mut sheet = std::mem::take(kept);
            let mut batch = EncodedBatch::default();
            for (index, grid) in (first as u64..).zip(grids) {
                let start = batch.values.len();
                let regions =
                    sheet.encode(&self.rules, grid, index, options, interrupt, &mut batch.values)?;
                batch.lengths.push(batch.values.len() - start);
                batch.regions.extend(regions);
            }
            if sheet.capacity() <= KEPT_POSITIONS {
                *kept = sheet;
            }
            Ok(batch)
        })
    }

    fn check(&self, grids: &[Grid], options: &EncodeOptions) -> Result<()> {
        if let Some(Dropout { probability, .. }) = options.dropout
            && !(0.0..=1.0).contains(&probability)
        {
            let value = probability.to_string();
            return Err(Error::Option { name: "dropout", value, expected: "a probability, 0 to 1" });
        }
        let check = |(index, grid): (usize, &Grid)| grid.check_ids(index, self.rules.base_vocab_size);
        grids.iter().enumerate().try_for_each(check)
    }
}

impl Dropout {
    /// Whether grid `index` skips this candidate; a coin that depends on nothing but its arguments.
    ///
    /// `x` and `y` are the anchors' cells in raster order, counted from 0.
    pub(crate) fn skips(self, index: u64, rule: u32, x: u32, y: u32) -> bool {
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
