//! Training: rule after rule, with everything that decides the next rule kept up to date.
//!
//! Grids are dealt out to shards, one per thread, and a shard alone touches its regions and lists. For every rule
//! the shards merge and hand back counts, which are summed here, so the result does not depend on their number.
//!
//! Most pairs are never merged. A pair's frequency cannot rise once the newer of its tokens has been made, so only
//! pairs at or above a threshold are *indexed*: counted exactly, with lists of where they occur. The others can be
//! left out for as long as a pair just below the threshold could not win; then the threshold is lowered and all
//! pairs are counted again, which happens a few times in a run.

mod candidates;
mod shard;

use std::collections::BTreeMap;

use crate::error::Result;
use crate::grid::{Grid, Offset};
use crate::interrupt::Interrupt;
use crate::statistics::{consistency, most_frequent, tokens};
use crate::threads::Threads;
use crate::vocabulary::{GridSize, MergeMode, Quantizer, Rule, Vocabulary, check_options};
use candidates::{Best, Candidates, Evaluation};
use shard::{Merge, Shard, Slots};

/// How to learn a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Number of ids in the codebook (K).
    pub base_vocab_size: u32,
    /// Most rules to learn.
    pub num_merges: usize,
    /// What a rule matches.
    pub merge_mode: MergeMode,
    /// Weight of spatial consistency in the priority.
    pub alpha: f64,
    /// Width of the kernel of spatial consistency, in cells.
    pub sigma: f64,
    /// Least frequency of a pair that is merged.
    pub min_frequency: u64,
    /// Number of threads; 0 means one per core. The result does not depend on it.
    pub num_threads: usize,
    /// About how many pairs to index when all pairs are counted. The result does not depend on it: fewer mean
    /// counting more often, more mean more to keep up to date.
    pub indexed_pairs: usize,
    /// The quantizer whose ids these are.
    pub quantizer: Quantizer,
}

impl Default for TrainOptions {
    /// The specification's defaults, for a codebook of 8192 ids.
    fn default() -> Self {
        Self {
            base_vocab_size: 8192,
            num_merges: 8192,
            merge_mode: MergeMode::Pair,
            alpha: 0.3,
            sigma: 1.0,
            min_frequency: 2,
            num_threads: 0,
            indexed_pairs: 20_000,
            quantizer: Quantizer::default(),
        }
    }
}

/// How far training has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Rules learned.
    pub merges: usize,
    /// Most rules to learn.
    pub num_merges: usize,
    /// The rule learned last.
    pub rule: Rule,
}

/// Learns a vocabulary from grids. `progress` is called after every rule.
///
/// # Errors
/// Grids or options that cannot be used, [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop.
pub fn train(
    grids: &[Grid],
    options: &TrainOptions,
    mut progress: impl FnMut(Progress),
    interrupt: &Interrupt,
) -> Result<Vocabulary> {
    let &TrainOptions { base_vocab_size, num_merges, merge_mode, alpha, sigma, min_frequency, .. } = options;
    check_options(base_vocab_size, num_merges, alpha, sigma, min_frequency)?;
    let check = |(index, grid): (usize, &Grid)| grid.check_ids(index, base_vocab_size);
    grids.iter().enumerate().try_for_each(check)?;

    let mut trainer = Trainer::new(grids, options, interrupt)?;
    let mut rules = Vec::new();
    while rules.len() < num_merges {
        interrupt.check()?;
        let Some(best) = trainer.select()? else { break };
        let rule = trainer.apply(&best)?;
        rules.push(rule);
        progress(Progress { merges: rules.len(), num_merges, rule });
    }
    let quantizer = options.quantizer.clone();
    let grid_sizes = grid_sizes(grids);
    Ok(Vocabulary { base_vocab_size, merge_mode, alpha, sigma, min_frequency, quantizer, grid_sizes, rules })
}

fn grid_sizes(grids: &[Grid]) -> Vec<GridSize> {
    let mut sizes = BTreeMap::new();
    for grid in grids {
        *sizes.entry((grid.height(), grid.width())).or_default() += 1;
    }
    sizes.into_iter().map(|((height, width), grids)| GridSize { height, width, grids }).collect()
}

/// With fewer occurrences than this, a pair is not worth waking threads for.
const PARALLEL_OCCURRENCES: u64 = 1024;

/// With fewer cells than this, a full count is not worth waking threads for.
const PARALLEL_CELLS: usize = 1 << 14;

struct Trainer<'a> {
    options: &'a TrainOptions,
    interrupt: &'a Interrupt,
    threads: Threads,
    shards: Vec<Shard>,
    num_cells: usize,
    candidates: Candidates,
    /// Per token, the indexed pairs that contain it, and some that no longer are indexed.
    pairs_of: Vec<Vec<u32>>,
    /// Every pair with at least this frequency is indexed.
    threshold: u64,
    slots: Slots,
}

impl<'a> Trainer<'a> {
    fn new(grids: &[Grid], options: &'a TrainOptions, interrupt: &'a Interrupt) -> Result<Self> {
        let threads = Threads::new(options.num_threads)?;
        let num_cells = grids.iter().map(|grid| grid.ids().len()).sum();
        let mut shards = shard::deal(grids, threads.count());
        threads.map(&mut shards, num_cells >= PARALLEL_CELLS, |shard| shard.fill(grids, interrupt));
        let mut trainer = Self {
            options,
            interrupt,
            threads,
            shards,
            num_cells,
            candidates: Candidates::default(),
            pairs_of: vec![Vec::new(); options.base_vocab_size as usize],
            threshold: u64::MAX,
            slots: Slots::default(),
        };
        trainer.index(u64::MAX)?;
        Ok(trainer)
    }

    /// The candidate with the highest priority.
    fn select(&mut self) -> Result<Option<Best>> {
        loop {
            let best = self.best_indexed()?;
            let missed = self.threshold - 1;
            if missed < self.options.min_frequency {
                return Ok(best);
            }
            // Below this threshold no pair that is not indexed can win, even one of full consistency.
            let needed = match best {
                Some(Best { priority, max_frequency, .. }) => {
                    if missed as f64 / max_frequency as f64 + self.options.alpha < priority {
                        return Ok(best);
                    }
                    ((priority - self.options.alpha) * max_frequency as f64).max(0.0) as u64
                }
                None => self.threshold,
            };
            // Some way further down, so that the next count is not due after the next rule.
            self.index((needed - needed / 4).min(self.threshold - 1 - self.threshold / 4))?;
        }
    }

    fn best_indexed(&mut self) -> Result<Option<Best>> {
        let Self { options, interrupt, threads, shards, candidates, threshold, .. } = self;
        let mut dropped = Vec::new();
        let evaluate = |pair: u32, key: u64, count: u64| {
            interrupt.check()?;
            let histogram = histogram(shards, threads, pair, key, count);
            let (offset, offset_count) = most_frequent(&histogram);
            let frequency = match options.merge_mode {
                MergeMode::Pair => count,
                MergeMode::Oriented => offset_count,
            };
            if frequency < *threshold {
                dropped.push(pair);
                return Ok(None);
            }
            let consistency = consistency(&histogram, options.sigma);
            Ok(Some(Evaluation { frequency, offset, offset_count, consistency }))
        };
        let best = candidates.best(options.alpha, evaluate)?;
        for pair in dropped {
            for shard in &mut *shards {
                shard.forget(pair);
            }
        }
        Ok(best)
    }

    /// Makes the best pair a rule, applies it to every grid and updates all counts.
    fn apply(&mut self, best: &Best) -> Result<Rule> {
        let Best { pair, key, count, evaluation, .. } = *best;
        let Evaluation { offset, offset_count, consistency, .. } = evaluation;
        let (a, b) = tokens(key);
        let offset = (self.options.merge_mode == MergeMode::Oriented).then_some(offset);
        let token = self.pairs_of.len() as u32;
        self.pairs_of.push(Vec::new());
        for token in [a, b] {
            self.pairs_of[token as usize].retain(|&pair| self.candidates.is_indexed(pair));
        }
        let mut changing = self.pairs_of[a as usize].clone();
        changing.extend_from_slice(&self.pairs_of[b as usize]);
        changing.sort_unstable();
        changing.dedup();
        self.slots.assign(a, b, token, changing.iter().map(|&pair| self.candidates.key(pair)));

        let Self { threads, shards, slots, interrupt, .. } = self;
        let worthwhile = count >= PARALLEL_OCCURRENCES;
        let merge = Merge { pair, a, b, offset, token, slots };
        let changes = threads.map(shards, worthwhile, |shard| shard.apply(&merge, interrupt));
        interrupt.check()?;

        let mut added = Vec::new();
        let mut removed = vec![0; changing.len()];
        for change in changes {
            added.extend(change.added);
            for (sum, count) in removed.iter_mut().zip(change.removed) {
                *sum += u64::from(count);
            }
        }
        for (pair, removed) in changing.into_iter().zip(removed) {
            if removed > 0 && !self.candidates.remove(pair, removed, self.threshold) {
                for shard in &mut self.shards {
                    shard.forget(pair);
                }
            }
        }
        let added = self.add(added);
        let index = |shard: &mut Shard| shard.index_added(token, &added);
        self.threads.map(&mut self.shards, worthwhile, index);
        Ok(Rule { a, b, offset, count, offset_count, consistency })
    }

    /// Sums the counts of new pairs and takes up those at or above the threshold. Returns what was taken up.
    fn add(&mut self, mut counts: Vec<(u64, u64)>) -> Vec<(u64, u32)> {
        counts.sort_unstable();
        let mut added = Vec::new();
        for counts in counts.chunk_by(|one, other| one.0 == other.0) {
            let (key, count) = (counts[0].0, counts.iter().map(|(_, count)| count).sum());
            if count >= self.threshold {
                let pair = self.candidates.insert(key, count);
                let (a, b) = tokens(key);
                self.pairs_of[a as usize].push(pair);
                if b != a {
                    self.pairs_of[b as usize].push(pair);
                }
                added.push((key, pair));
            }
        }
        added
    }

    /// Counts all pairs and indexes the frequent ones, with a threshold of at most `limit`.
    fn index(&mut self, limit: u64) -> Result<()> {
        let Self { options, interrupt, threads, shards, .. } = self;
        let worthwhile = self.num_cells >= PARALLEL_CELLS;
        let bits = (2 * self.num_cells).max(1).ilog2().clamp(10, 24);
        let sketches = threads.map(shards, worthwhile, |shard| shard.sketch(bits, interrupt));
        interrupt.check()?;
        let sketch = sketches.into_iter().reduce(add_saturating).unwrap_or_default();
        let threshold = frequent(&sketch, options.indexed_pairs).min(limit).max(options.min_frequency);
        let count = |shard: &mut Shard| shard.count(&sketch, bits, threshold, interrupt);
        let counts = threads.map(shards, worthwhile, count).concat();
        interrupt.check()?;

        self.threshold = threshold;
        self.candidates = Candidates::default();
        self.pairs_of.iter_mut().for_each(Vec::clear);
        let added = self.add(counts).into_iter().collect();
        self.threads.map(&mut self.shards, worthwhile, |shard| shard.index_counted(&added));
        Ok(())
    }
}

fn add_saturating(mut sums: Vec<u32>, counts: Vec<u32>) -> Vec<u32> {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum = sum.saturating_add(count);
    }
    sums
}

/// The least threshold that at most `wanted` counts reach.
fn frequent(sketch: &[u32], wanted: usize) -> u64 {
    let mut counts: Vec<u32> = sketch.iter().copied().filter(|&count| count > 0).collect();
    if counts.len() <= wanted {
        return 1;
    }
    let (_, &mut count, _) = counts.select_nth_unstable_by(wanted, |one, other| other.cmp(one));
    u64::from(count) + 1
}

/// How often an indexed pair occurs at which offset, in ascending order of offsets.
fn histogram(shards: &mut [Shard], threads: &Threads, pair: u32, key: u64, count: u64) -> Vec<(Offset, u64)> {
    let worthwhile = count >= PARALLEL_OCCURRENCES;
    let mut parts = threads.map(shards, worthwhile, |shard| shard.histogram(pair, key)).concat();
    parts.sort_unstable();
    let mut histogram: Vec<(Offset, u64)> = Vec::with_capacity(parts.len());
    for (offset, count) in parts {
        match histogram.last_mut() {
            Some((last, sum)) if *last == offset => *sum += count,
            _ => histogram.push((offset, count)),
        }
    }
    debug_assert_eq!(histogram.iter().map(|(_, count)| count).sum::<u64>(), count);
    histogram
}
