//! Learning a vocabulary from many grids: options, and the [`Trainer`] that is the interface of it.
//!
//! # The algorithm
//! The result is that of counting all pairs of adjacent regions again for every merge; but almost all counts stay as
//! they are from one merge to the next, so they are kept up to date instead:
//! 1. **Count.** All pairs are counted once. Those at or above a threshold are *indexed*: each with its exact count and
//!    a list of where it occurs. (`count_cells`, `count_regions`, `occurrences`)
//! 2. **Select.** The candidate of the highest priority is the next merge. Spatial consistency is worked out only for
//!    candidates that are frequent enough to win. If a pair that is not indexed could win, all pairs are counted again
//!    with a lower threshold. (`candidates`, `learner`)
//! 3. **Join.** Each shard walks over its list of the pair's occurrences, in raster order, and makes one region of each
//!    two that are still there. What this takes away from the counts of pairs, and the adjacencies of the new token,
//!    are recorded on the way. (`shard`, `merge`, `neighbours`)
//! 4. **Update.** The changes of all shards are added up, so the result does not depend on their number. Candidates
//!    lose what was taken away; new pairs at or above the threshold are indexed. (`learner`)
//! 5. **Repeat** from step 2 until there are enough merges, or no candidate is left.
//!
//! The threshold is what makes this fast. Most pairs are never merged, and a pair's frequency cannot rise once the
//! newer of its tokens has been made. So pairs below the threshold can be left out for as long as none of them could
//! win. They are counted again only a few times in a run.
//!
//! # Words
//! - **cell**: one id of a grid; **region**: the cells that one token covers; **anchor**: a region's first cell in
//!   raster order; **position**: the index of a cell in memory, border cells included; **stride**: positions from a
//!   cell to the one below.
//! - **pair**: two tokens (a, b), whose regions are adjacent, that of a anchored first; **occurrence**: where that is
//!   so; **adjacency**: the same, as recorded in a merge; **new pair**: a pair with the token of the last merge.
//! - **count**: number of a pair's occurrences; **frequency**: the count, in oriented mode the count at the most
//!   frequent offset; **threshold**: every pair with this frequency is indexed.
//! - **candidate**: an indexed pair; **queued** until it is evaluated, then **ranked**.
//! - **shard**: some of the grids, worked on by one thread, with the lists of occurrences in them.
//! - **branchless**: in the innermost loops a processor guesses wrong half the time which way a branch goes, which
//!   takes longer than the work. So these loops write every item to the end of their output, and move the end only for
//!   items that count. Such places are marked with this word.

mod assign;
mod candidates;
mod count_cells;
mod count_regions;
mod learner;
mod merge;
mod neighbours;
mod occurrences;
mod options;
mod pair;
mod regions;
mod shard;
mod word;

use std::collections::BTreeMap;

use crate::encode::Encoder;
use crate::error::{Error, Result};
use crate::grid::{Grid, check_size};
use crate::interrupt::Interrupt;
use crate::memory;
use crate::vocabulary::{GridSize, Merge, Vocabulary, check_options};
use learner::MergeLearner;
pub use options::TrainOptions;

/// What memory is for, in messages.
const SIZES: &str = "the sizes of the grids";
const MERGES: &str = "the merges";

/// How far training has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Merges learned.
    pub merges: usize,
    /// Most merges to learn.
    pub num_merges: usize,
    /// The merge learned last.
    pub merge: Merge,
    /// Length of all grids in cells.
    pub cells: u64,
    /// Length of all grids in tokens.
    pub tokens: u64,
}

/// Learns a vocabulary from grids. `progress` is called after every merge.
///
/// # Errors
/// Grids or options that cannot be used, [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop.
pub fn train(
    grids: &[Grid],
    options: &TrainOptions,
    progress: impl FnMut(Progress) + Send,
    interrupt: &Interrupt,
) -> Result<Vocabulary> {
    let sizes = grids.iter().map(|grid| (grid.height() as usize, grid.width() as usize));
    let sizes: Vec<_> = memory::collect(sizes, SIZES)?;
    let mut trainer = Trainer::new(&sizes, options.clone(), None)?;
    trainer.set_grids(0, grids)?;
    trainer.run(options.num_merges, progress, interrupt)?;
    trainer.vocabulary()
}

/// Training in steps, for grids that come one after the other and for work that is stopped and continued later.
///
/// First every grid is set, then [`Trainer::run`] learns merges. [`Trainer::vocabulary`] holds the merges learned so
/// far at any time, also after an interruption.
pub struct Trainer {
    options: TrainOptions,
    /// Height and width of every grid.
    sizes: Vec<(u32, u32)>,
    /// Encodes grids with the vocabulary that training goes on from.
    encoder: Option<Encoder>,
    merges: Vec<Merge>,
    num_cells: u64,
    is_started: bool,
    learner: Box<dyn MergeLearner>,
}

impl Trainer {
    /// Prepares for grids of these (heights, widths). With `resume`, training goes on from that vocabulary.
    ///
    /// # Errors
    /// Sizes or options that cannot be used, [`Error::Resume`] for a vocabulary that was learned with other options.
    pub fn new(sizes: &[(usize, usize)], options: TrainOptions, resume: Option<&Vocabulary>) -> Result<Self> {
        memory::hold_reserve()?;
        let TrainOptions { base_vocab_size, num_merges, alpha, sigma, min_frequency, .. } = options;
        check_options(base_vocab_size, num_merges, alpha, sigma, min_frequency)?;
        for (index, &(height, width)) in sizes.iter().enumerate() {
            check_size(index, height, width)?;
        }
        let sizes = sizes.iter().map(|&(height, width)| (height as u32, width as u32));
        let sizes: Vec<_> = memory::collect(sizes, SIZES)?;
        if let Some(vocabulary) = resume {
            check_resume(vocabulary, &options, &grid_sizes(&sizes))?;
        }
        Ok(Self {
            num_cells: sizes.iter().map(|&(height, width)| u64::from(height) * u64::from(width)).sum(),
            learner: learner::new(&sizes, &options)?,
            options,
            sizes,
            encoder: resume.map(Encoder::new).transpose()?,
            merges: memory::collect(resume.into_iter().flat_map(Vocabulary::merges).copied(), MERGES)?,
            is_started: false,
        })
    }

    /// Gives grid `first` and those after it their ids. Several threads may do this at once.
    ///
    /// # Errors
    /// A grid of another size, ids that are not in the codebook.
    pub fn set_grids(&self, first: usize, grids: &[Grid]) -> Result<()> {
        for (index, grid) in (first..).zip(grids) {
            let (height, width) = self.sizes[index];
            if (grid.height(), grid.width()) != (height, width) {
                let (height, width, length) = (height as usize, width as usize, grid.ids().len());
                return Err(Error::GridLength { grid: index, height, width, length });
            }
            grid.check_ids(index, self.options.base_vocab_size)?;
        }
        self.learner.set_grids(first, grids, self.encoder.as_ref())
    }

    /// Learns merges until there are `limit` or as many as the options say, or no candidate is left. `progress` is
    /// called after every merge. Can be called again to learn more.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop; then nothing more can be learned.
    pub fn run(
        &mut self,
        limit: usize,
        progress: impl FnMut(Progress) + Send,
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.learner.start_threads()?;
        let result = self.learn(limit, progress, interrupt);
        self.learner.stop_threads();
        result
    }

    fn learn(
        &mut self,
        limit: usize,
        mut progress: impl FnMut(Progress),
        interrupt: &Interrupt,
    ) -> Result<()> {
        let num_merges = self.options.num_merges;
        if !self.is_started {
            self.learner.count_all(&self.merges, interrupt)?;
            self.is_started = true;
        }
        while self.merges.len() < limit.min(num_merges) {
            interrupt.check()?;
            let Some(merge) = self.learner.learn_merge(interrupt)? else { break };
            memory::push(&mut self.merges, merge, MERGES)?;
            let (merges, cells, tokens) = (self.merges.len(), self.num_cells, self.learner.num_tokens());
            progress(Progress { merges, num_merges, merge, cells, tokens });
        }
        Ok(())
    }

    /// Number of merges learned so far.
    #[must_use]
    pub fn num_merges(&self) -> usize {
        self.merges.len()
    }

    /// The merges learned so far.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn vocabulary(&self) -> Result<Vocabulary> {
        let TrainOptions { base_vocab_size, merge_mode, alpha, sigma, min_frequency, .. } = self.options;
        let quantizer = self.options.quantizer.clone();
        let grid_sizes = grid_sizes(&self.sizes);
        let merges = memory::collect(self.merges.iter().copied(), MERGES)?;
        let vocabulary = Vocabulary {
            base_vocab_size,
            merge_mode,
            alpha,
            sigma,
            min_frequency,
            quantizer,
            grid_sizes,
            merges,
        };
        Ok(vocabulary)
    }
}

/// How many grids there are of each size.
fn grid_sizes(sizes: &[(u32, u32)]) -> Vec<GridSize> {
    let mut counts = BTreeMap::new();
    for size in sizes {
        *counts.entry(size).or_default() += 1;
    }
    counts.into_iter().map(|(&(height, width), grids)| GridSize { height, width, grids }).collect()
}

/// Makes sure that training with these options can go on from a vocabulary.
fn check_resume(vocabulary: &Vocabulary, options: &TrainOptions, sizes: &[GridSize]) -> Result<()> {
    let check_equal = |name: &str, old: String, new: String| {
        if old == new { Ok(()) } else { Err(Error::Resume(format!("{name} was {old}, now it is {new}"))) }
    };
    let text = |name: &Option<String>| name.clone().unwrap_or_else(|| "unknown".to_owned());
    let (old, new) = (vocabulary, options);
    check_equal("base_vocab_size", old.base_vocab_size.to_string(), new.base_vocab_size.to_string())?;
    check_equal("merge_mode", format!("{:?}", old.merge_mode), format!("{:?}", new.merge_mode))?;
    check_equal("alpha", old.alpha.to_string(), new.alpha.to_string())?;
    check_equal("sigma", old.sigma.to_string(), new.sigma.to_string())?;
    check_equal("min_frequency", old.min_frequency.to_string(), new.min_frequency.to_string())?;
    check_equal("the quantizer", text(&old.quantizer.name), text(&new.quantizer.name))?;
    check_equal("its fingerprint", text(&old.quantizer.fingerprint), text(&new.quantizer.fingerprint))?;
    if old.grid_sizes != sizes {
        return Err(Error::Resume("the grids differ in number or size from those learned from".to_owned()));
    }
    if old.merges.len() > new.num_merges {
        let (old, new) = (old.merges.len(), new.num_merges);
        return Err(Error::Resume(format!("it has {old} merges already, more than the {new} asked for")));
    }
    Ok(())
}
