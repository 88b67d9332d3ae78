//! Encoding: a grid's ids become tokens by the merges in the order learned.

mod apply;
mod merges;
mod options;
mod workspace;

use std::cell::RefCell;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::grid::{Grid, Regions};
use crate::interrupt::Interrupt;
use crate::memory;
use crate::threads::Threads;
use crate::vocabulary::Vocabulary;
use merges::MergeIndex;
pub use options::{Dropout, EncodeOptions};
use workspace::Workspace;

/// A batch of fewer cells is encoded on the calling thread.
const MIN_PARALLEL_CELLS: usize = 1 << 15;

/// Grids that a thread encodes at a time, at most.
const MAX_CHUNK: usize = 64;

/// What memory is for, in messages.
const TOKENS: &str = "the tokens of the grids";

/// A workspace of more positions is not kept after a call.
const MAX_KEPT_POSITIONS: usize = 1 << 20;

thread_local! {
    // Per thread and not per encoder, so that no lock is needed, which a fork could leave locked.
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// The tokens of one grid.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoding {
    /// The tokens in raster order of their regions' anchors.
    pub ids: Vec<u32>,
    /// Which token covers which cell, if the options say so.
    pub regions: Option<Regions>,
}

/// The tokens of many grids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EncodedBatch {
    /// The tokens of grid 0, then those of grid 1, and so on.
    pub values: Vec<u32>,
    /// Per grid, the number of its tokens.
    pub lengths: Vec<usize>,
    /// Per grid, which token covers which cell, if the options say so.
    pub regions: Vec<Regions>,
}

impl EncodedBatch {
    /// The tokens of grid after grid.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = self.values.as_slice();
        self.lengths.iter().map(move |&length| {
            let (ids, tail) = rest.split_at(length);
            rest = tail;
            ids
        })
    }

    /// Puts another batch after this one.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn append(&mut self, mut other: Self) -> Result<()> {
        memory::reserve(&mut self.values, other.values.len(), TOKENS)?;
        memory::reserve(&mut self.lengths, other.lengths.len(), TOKENS)?;
        memory::reserve(&mut self.regions, other.regions.len(), TOKENS)?;
        self.values.append(&mut other.values);
        self.lengths.append(&mut other.lengths);
        self.regions.append(&mut other.regions);
        Ok(())
    }
}

/// A vocabulary's merges, indexed for encoding.
#[derive(Debug)]
pub struct Encoder {
    merges: MergeIndex,
}

impl Encoder {
    /// Indexes a vocabulary's merges.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        memory::hold_reserve()?;
        Ok(Self { merges: MergeIndex::new(vocabulary)? })
    }

    /// Encodes one grid.
    ///
    /// # Errors
    /// [`Error::GridId`] for an id that is not in the codebook, [`Error::Option`] for a probability out of range,
    /// [`Error::Interrupted`] if asked to stop, [`Error::Memory`].
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
        let threads = Threads::new(if cells < MIN_PARALLEL_CELLS { 1 } else { num_threads })?;
        let Some(pool) = threads.pool() else {
            return self.encode_chunk(0, grids, options, interrupt);
        };
        // Several chunks per thread, so that no thread waits long for the last one.
        let size = grids.len().div_ceil(threads.count() * 8).min(MAX_CHUNK);
        let encode = |(chunk, grids)| self.encode_chunk(chunk * size, grids, options, interrupt);
        let chunks: Result<Vec<_>> =
            pool.install(|| grids.par_chunks(size).enumerate().map(encode).collect());
        let mut batch = EncodedBatch::default();
        chunks?.into_iter().try_for_each(|chunk| batch.append(chunk))?;
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
        WORKSPACE.with_borrow_mut(|thread_workspace| {
            // After an error the workspace is not put back, since it is in the middle of a grid.
            let mut workspace = std::mem::take(thread_workspace);
            let mut batch = EncodedBatch::default();
            for (index, grid) in (first as u64..).zip(grids) {
                let start = batch.values.len();
                let regions =
                    workspace.encode(&self.merges, grid, index, options, interrupt, &mut batch.values)?;
                memory::push(&mut batch.lengths, batch.values.len() - start, TOKENS)?;
                memory::extend(&mut batch.regions, regions, TOKENS)?;
            }
            if workspace.capacity() <= MAX_KEPT_POSITIONS {
                *thread_workspace = workspace;
            }
            Ok(batch)
        })
    }

    fn check(&self, grids: &[Grid], options: &EncodeOptions) -> Result<()> {
        memory::hold_reserve()?;
        if let Some(Dropout { probability, .. }) = options.dropout
            && !(0.0..=1.0).contains(&probability)
        {
            let value = probability.to_string();
            return Err(Error::Option { name: "dropout", value, expected: "a probability, 0 to 1" });
        }
        let check = |(index, grid): (usize, &Grid)| grid.check_ids(index, self.merges.base_vocab_size);
        grids.iter().enumerate().try_for_each(check)
    }
}
