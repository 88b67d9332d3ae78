//! Training: rule after rule, with everything that decides the next rule kept up to date.
//!
//! Grids are dealt out to shards, one per thread, and a shard alone touches its regions and lists. For every rule
//! the shards merge and hand back counts, which are summed here, so the result does not depend on their number.
//!
//! Most pairs are never merged. A pair's frequency cannot rise once the newer of its tokens has been made, so only
//! pairs at or above a threshold are *indexed*: counted exactly, with lists of where they occur. The others can be
//! left out for as long as a pair just below the threshold could not win; then the threshold is lowered and all
//! pairs are counted again, which happens a few times in a run.

mod assign;
mod candidates;
mod count_cells;
mod count_regions;
mod occurrences;
mod regions;
mod shard;

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::encode::{EncodeOptions, Encoder};
use crate::error::{Error, Result};
use crate::grid::{Grid, Offset, check_size};
use crate::interrupt::Interrupt;
use crate::statistics::{consistency, key, most_frequent, tokens};
use crate::threads::Threads;
use crate::vocabulary::{GridSize, MergeMode, Quantizer, Rule, Vocabulary, check_options};
use crate::workers::Crew;
use assign::Dealer;
use candidates::{Best, Candidates, Evaluation, Fresh};
use count_cells::Search;
use count_regions::{Count, Sketch};
use regions::{Canvas, Short, Word};
use shard::{Merge, NewPair, Outcome, Pair, Shard, new_key, new_pair};

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
    /// Number of threads; 0 means one per core, but fewer for few grids. The result does not depend on it.
    pub num_threads: usize,
    /// About how many pairs to index when all pairs are counted, or up to twice as many in oriented mode or with a large
    /// alpha. The result does not depend on it: fewer mean counting more often, more mean more to keep up to date.
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
    /// Length of all grids in cells.
    pub cells: u64,
    /// Length of all grids in tokens.
    pub tokens: u64,
}

/// Learns a vocabulary from grids. `progress` is called after every rule.
///
/// # Errors
/// Grids or options that cannot be used, [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop.
pub fn train(
    grids: &[Grid],
    options: &TrainOptions,
    progress: impl FnMut(Progress) + Send,
    interrupt: &Interrupt,
) -> Result<Vocabulary> {
    let sizes: Vec<_> = grids.iter().map(|grid| (grid.height() as usize, grid.width() as usize)).collect();
    let mut trainer = Trainer::new(&sizes, options.clone(), None)?;
    trainer.set(0, grids)?;
    trainer.run(options.num_merges, progress, interrupt)?;
    Ok(trainer.vocabulary())
}

/// Training in steps, for grids that come one after the other and for work that is stopped and taken up again.
///
/// First every grid is set, then [`Trainer::run`] learns rules. [`Trainer::vocabulary`] holds the rules learned so far
/// at any time, also after an interruption.
pub struct Trainer {
    options: TrainOptions,
    /// Height and width of every grid.
    sizes: Vec<(u32, u32)>,
    /// Of the vocabulary that training goes on from.
    encoder: Option<Encoder>,
    rules: Vec<Rule>,
    cells: u64,
    started: bool,
    grids: Box<dyn Learn>,
}

impl Trainer {
    /// Prepares for grids of these (heights, widths). With `resume`, training goes on from that vocabulary.
    ///
    /// # Errors
    /// Sizes or options that cannot be used, [`Error::Resume`] for a vocabulary that was learned with other options.
    pub fn new(sizes: &[(usize, usize)], options: TrainOptions, resume: Option<&Vocabulary>) -> Result<Self> {
        let TrainOptions { base_vocab_size, num_merges, alpha, sigma, min_frequency, .. } = options;
        check_options(base_vocab_size, num_merges, alpha, sigma, min_frequency)?;
        for (index, &(height, width)) in sizes.iter().enumerate() {
            check_size(index, height, width)?;
        }
        let sizes: Vec<_> = sizes.iter().map(|&(height, width)| (height as u32, width as u32)).collect();
        let cells = sizes.iter().map(|&(height, width)| u64::from(height) * u64::from(width)).sum();
        if let Some(vocabulary) = resume {
            check_resume(vocabulary, &options, &grid_sizes(&sizes))?;
        }
        let largest = sizes.iter().map(|&(height, width)| Canvas::<u64>::footprint(height, width)).max();
        let tokens = base_vocab_size + num_merges as u32;
        let largest = largest.unwrap_or(0);
        let grids: Box<dyn Learn> = if Short::<15>::fits(tokens, largest) {
            Box::new(Learner::<Short<15>>::new(&sizes, &options)?)
        } else if Short::<18>::fits(tokens, largest) {
            Box::new(Learner::<Short<18>>::new(&sizes, &options)?)
        } else {
            Box::new(Learner::<u64>::new(&sizes, &options)?)
        };
        Ok(Self {
            options,
            sizes,
            encoder: resume.map(Encoder::new),
            rules: resume.map_or_else(Vec::new, |vocabulary| vocabulary.rules().to_vec()),
            cells,
            started: false,
            grids,
        })
    }

    /// Gives grid `first` and those after it their ids. Several threads may do this at once.
    ///
    /// # Errors
    /// A grid of another size, ids that are not in the codebook.
    pub fn set(&self, first: usize, grids: &[Grid]) -> Result<()> {
        for (index, grid) in (first..).zip(grids) {
            let (height, width) = self.sizes[index];
            if (grid.height(), grid.width()) != (height, width) {
                let (height, width, found) = (height as usize, width as usize, grid.ids().len());
                return Err(Error::GridLength { grid: index, height, width, found });
            }
            grid.check_ids(index, self.options.base_vocab_size)?;
        }
        self.grids.set(first, grids, self.encoder.as_ref())
    }

    /// Learns rules until there are `limit` or as many as the options say, or no candidate is left. `progress` is called
    /// after every rule. Can be called again for more.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop; then nothing more can be learned.
    pub fn run(
        &mut self,
        limit: usize,
        progress: impl FnMut(Progress) + Send,
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.grids.start_threads()?;
        let result = self.learn(limit, progress, interrupt);
        self.grids.stop_threads();
        result
    }

    fn learn(
        &mut self,
        limit: usize,
        mut progress: impl FnMut(Progress),
        interrupt: &Interrupt,
    ) -> Result<()> {
        let num_merges = self.options.num_merges;
        if !self.started {
            self.grids.start(&self.rules, interrupt)?;
            self.started = true;
        }
        while self.rules.len() < limit.min(num_merges) {
            interrupt.check()?;
            let Some(rule) = self.grids.learn(interrupt)? else { break };
            self.rules.push(rule);
            let (merges, cells, tokens) = (self.rules.len(), self.cells, self.grids.tokens());
            progress(Progress { merges, num_merges, rule, cells, tokens });
        }
        Ok(())
    }

    /// Number of rules learned so far.
    #[must_use]
    pub fn num_rules(&self) -> usize {
        self.rules.len()
    }

    /// The rules learned so far.
    #[must_use]
    pub fn vocabulary(&self) -> Vocabulary {
        let TrainOptions { base_vocab_size, merge_mode, alpha, sigma, min_frequency, .. } = self.options;
        let quantizer = self.options.quantizer.clone();
        let (grid_sizes, rules) = (grid_sizes(&self.sizes), self.rules.clone());
        Vocabulary { base_vocab_size, merge_mode, alpha, sigma, min_frequency, quantizer, grid_sizes, rules }
    }
}

fn grid_sizes(sizes: &[(u32, u32)]) -> Vec<GridSize> {
    let mut counts = BTreeMap::new();
    for size in sizes {
        *counts.entry(size).or_default() += 1;
    }
    counts.into_iter().map(|(&(height, width), grids)| GridSize { height, width, grids }).collect()
}

/// Makes sure that training with these options can go on from a vocabulary.
fn check_resume(vocabulary: &Vocabulary, options: &TrainOptions, sizes: &[GridSize]) -> Result<()> {
    let differ = |name: &str, old: String, new: String| {
        if old == new { Ok(()) } else { Err(Error::Resume(format!("{name} was {old}, now it is {new}"))) }
    };
    let text = |name: &Option<String>| name.clone().unwrap_or_else(|| "unknown".to_owned());
    let (old, new) = (vocabulary, options);
    differ("base_vocab_size", old.base_vocab_size.to_string(), new.base_vocab_size.to_string())?;
    differ("merge_mode", format!("{:?}", old.merge_mode), format!("{:?}", new.merge_mode))?;
    differ("alpha", old.alpha.to_string(), new.alpha.to_string())?;
    differ("sigma", old.sigma.to_string(), new.sigma.to_string())?;
    differ("min_frequency", old.min_frequency.to_string(), new.min_frequency.to_string())?;
    differ("the quantizer", text(&old.quantizer.name), text(&new.quantizer.name))?;
    differ("its fingerprint", text(&old.quantizer.fingerprint), text(&new.quantizer.fingerprint))?;
    if old.grid_sizes != sizes {
        return Err(Error::Resume("the grids differ in number or size from those learned from".to_owned()));
    }
    if old.rules.len() > new.num_merges {
        let (old, new) = (old.rules.len(), new.num_merges);
        return Err(Error::Resume(format!("it has {old} merges already, more than the {new} asked for")));
    }
    Ok(())
}

/// With fewer occurrences than this, merging a pair is not worth handing to threads.
const PARALLEL_MERGES: u64 = 1 << 7;

/// With fewer occurrences than this, neither is counting pairs' offsets.
const PARALLEL_OCCURRENCES: u64 = 1 << 9;

/// With fewer cells than this, a full count is not worth waking threads for.
const PARALLEL_CELLS: u64 = 1 << 14;

/// Most bits of the hashes that pairs are counted by.
const MAX_SKETCH_BITS: u32 = 22;

/// With fewer cells than this, a shard is not worth a thread, unless somebody asks for so many threads.
const MIN_SHARD_CELLS: u64 = 1 << 21;

/// Most cells of a shard before its last grid is added. With that grid there are fewer than 2^31 cells, so positions
/// and all counts within a shard fit 32 bits.
const MAX_SHARD_CELLS: u64 = 1 << 30;

/// What training does, whatever the words are that cells are kept in.
trait Learn: Send + Sync {
    /// Fills grid `first` and those after it, encoded if there is an encoder.
    fn set(&self, first: usize, grids: &[Grid], encoder: Option<&Encoder>) -> Result<()>;
    /// Counts everything after these rules.
    fn start(&mut self, rules: &[Rule], interrupt: &Interrupt) -> Result<()>;
    /// Finds and applies one rule; `None` if no candidate is left.
    fn learn(&mut self, interrupt: &Interrupt) -> Result<Option<Rule>>;
    /// Number of regions.
    fn tokens(&self) -> u64;
    fn start_threads(&mut self) -> Result<()>;
    fn stop_threads(&mut self);
}

struct Learner<W: Word> {
    options: TrainOptions,
    /// For work that is not shard by shard.
    threads: Threads,
    shards: Crew<Shard<W>>,
    dealer: Mutex<Dealer>,
    num_tokens: u64,
    candidates: Candidates,
    /// Of the pairs evaluated last, and memory for more.
    histograms: Vec<Histogram>,
    /// Pairs dropped since the last rule, whose lists are no longer needed.
    dropped: Vec<u32>,
    /// Per token, the indexed pairs that contain it, and some that no longer are indexed. A pair of twice the same token
    /// is there twice.
    pairs_of: Vec<Vec<PairOf>>,
    /// Every pair with at least this frequency is indexed.
    threshold: u64,
    /// Per token, the number of cells of its regions, at most.
    sizes: Vec<u64>,
}

impl<W: Word> Learn for Learner<W> {
    fn set(&self, first: usize, grids: &[Grid], encoder: Option<&Encoder>) -> Result<()> {
        let places = self.dealer.lock().expect("no thread panicked").deal(first, grids);
        for (grid, (shard, position)) in grids.iter().zip(places) {
            let shard = || self.shards.item(shard as usize);
            match encoder {
                None => shard().set(position, grid.width(), grid.ids()),
                Some(encoder) => {
                    let options = EncodeOptions { regions: true, ..EncodeOptions::default() };
                    let encoding = encoder.encode(grid, &options, &Interrupt::default())?;
                    shard().set_encoded(position, grid.width(), &encoding);
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, rules: &[Rule], interrupt: &Interrupt) -> Result<()> {
        for rule in rules {
            self.sizes.push(sized(&self.sizes, 0, key(rule.a, rule.b)).size());
        }
        self.pairs_of = vec![Vec::new(); self.sizes.len()];
        self.num_tokens = self.shards.items().iter().map(|shard| shard.tokens()).sum();
        self.index(u64::MAX, interrupt)
    }

    fn learn(&mut self, interrupt: &Interrupt) -> Result<Option<Rule>> {
        self.select(interrupt)?.map(|best| self.apply(&best, interrupt)).transpose()
    }

    fn tokens(&self) -> u64 {
        self.num_tokens
    }

    fn start_threads(&mut self) -> Result<()> {
        self.shards.start()
    }

    fn stop_threads(&mut self) {
        self.shards.stop();
    }
}

impl<W: Word> Learner<W> {
    /// Makes room for grids in shards of about equal numbers of cells. In a shard, grids of one width are together.
    fn new(sizes: &[(u32, u32)], options: &TrainOptions) -> Result<Self> {
        let threads = Threads::new(options.num_threads)?;
        let tokens = options.base_vocab_size + options.num_merges as u32;
        let cells = |&(height, width): &(u32, u32)| Canvas::<W>::footprint(height, width);
        let total: u64 = sizes.iter().map(cells).sum();
        let worthwhile = if options.num_threads == 0 { total / MIN_SHARD_CELLS } else { u64::MAX };
        let parts = worthwhile.clamp(1, threads.count() as u64).max(total.div_ceil(MAX_SHARD_CELLS));
        let mut shards = vec![(0, Vec::new()); sizes.len().min(parts as usize)];
        let mut order = sizes.to_vec();
        order.sort_by_key(|&(_, width)| width);
        for size in order {
            let (filled, members) =
                shards.iter_mut().min_by_key(|(filled, _)| *filled).expect("a shard for a grid");
            *filled += cells(&size);
            members.push(size);
        }
        let fill = |(filled, members): &mut (u64, Vec<(u32, u32)>)| {
            let mut shard = Shard::new(options.base_vocab_size, tokens);
            shard.reserve(*filled);
            let push = |&size: &(u32, u32)| (size, shard.push(size.0, size.1));
            let positions: Vec<_> = members.iter().map(push).collect();
            (shard, positions)
        };
        let filled = threads.map(&mut shards, total >= PARALLEL_CELLS, fill);
        let (shards, positions): (Vec<_>, Vec<_>) = filled.into_iter().unzip();
        let free = (0..).zip(positions).flat_map(|(shard, positions)| {
            positions.into_iter().map(move |(size, position)| (size, (shard, position)))
        });
        let dealer = Mutex::new(Dealer::new(options.base_vocab_size, sizes.len(), shards.len(), free));
        let shards = Crew::new(shards, threads.count());
        Ok(Self {
            options: options.clone(),
            threads,
            shards,
            dealer,
            num_tokens: 0,
            candidates: Candidates::default(),
            histograms: Vec::new(),
            dropped: Vec::new(),
            pairs_of: Vec::new(),
            threshold: u64::MAX,
            sizes: vec![1; options.base_vocab_size as usize],
        })
    }

    /// The candidate with the highest priority.
    fn select(&mut self, interrupt: &Interrupt) -> Result<Option<Best>> {
        loop {
            let best = self.best_indexed(interrupt)?;
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
                None => self.threshold / 2,
            };
            self.index(needed.min(missed), interrupt)?;
        }
    }

    fn best_indexed(&mut self, interrupt: &Interrupt) -> Result<Option<Best>> {
        let Self { options, shards, candidates, histograms, dropped, threshold, sizes, .. } = self;
        let evaluate = |batch: &[Fresh]| {
            count_offsets(shards, batch, sizes, options.base_vocab_size, histograms, interrupt)?;
            let evaluation = |(fresh, histogram): (&Fresh, &Histogram)| {
                let (offset, offset_count) = most_frequent(histogram);
                let frequency = match options.merge_mode {
                    MergeMode::Pair => fresh.count.all,
                    MergeMode::Oriented => offset_count,
                };
                if frequency < *threshold {
                    dropped.push(fresh.pair);
                    return None;
                }
                let consistency = consistency(histogram, options.sigma);
                Some(Evaluation { frequency, offset, offset_count, consistency })
            };
            Ok(batch.iter().zip(&*histograms).map(evaluation).collect())
        };
        candidates.best(options.alpha, evaluate)
    }

    /// Makes the best pair a rule, applies it to every grid and updates all counts.
    fn apply(&mut self, best: &Best, interrupt: &Interrupt) -> Result<Rule> {
        let Best { pair, key, count, evaluation, .. } = *best;
        let Evaluation { offset, offset_count, consistency, .. } = evaluation;
        let (a, b) = tokens(key);
        let offset = (self.options.merge_mode == MergeMode::Oriented).then_some(offset);
        let token = self.pairs_of.len() as u32;
        self.pairs_of.push(Vec::new());
        let pair = sized(&self.sizes, pair, key);
        self.sizes.push(pair.size());

        let merge = Merge { pair, offset, token };
        let of_both = [(a, 0), (b, 2)].into_iter().take(if a == b { 1 } else { 2 });
        let most = of_both.clone().map(|(token, _)| self.pairs_of[token as usize].len()).sum::<usize>() + 4;
        let mut sides = Vec::with_capacity(most);
        for (token, side) in of_both.clone() {
            for &PairOf { pair, other, before } in &self.pairs_of[token as usize] {
                self.candidates.fetch(pair);
                sides.push((other, side + usize::from(before)));
            }
        }
        // Pairs with the new token that are soon taken away.
        sides.extend((0..4).map(|side| (token, side)));
        let flag = interrupt.clone();
        let Self { shards, num_tokens, candidates, dropped, pairs_of, threshold, .. } = self;
        // A frequent pair occurs so often in one of the shards.
        let least = threshold.div_ceil(shards.len() as u64);
        shards.each(count >= PARALLEL_MERGES, move |shard| shard.apply(merge, &sides, least, &flag));
        interrupt.check()?;

        let mut shards_now = shards.items();
        *num_tokens -= shards_now.iter().map(|shard| shard.merged()).sum::<u64>();
        let mut number = 0;
        for (token, _) in of_both {
            pairs_of[token as usize].retain(|&PairOf { pair, .. }| {
                let mut removed = Count::default();
                for shard in &shards_now {
                    removed += shard.removed(number);
                }
                number += 1;
                let kept = candidates.is_indexed(pair)
                    && (removed == Count::default() || candidates.remove(pair, removed, *threshold));
                if !kept {
                    dropped.push(pair);
                }
                kept
            });
        }
        let gone = [(a, true), (a, false), (b, true), (b, false)].map(|(other, before)| {
            let gone = shards_now.iter().map(|shard| shard.removed(number).all).sum();
            number += 1;
            (new_pair(other, before), gone)
        });
        let added = new_pairs(&shards_now, &gone, *threshold, least);
        let keys = added.iter().map(|&(new, all)| (new_key(token, new), Count { all, below: 0 }));
        let pairs = take_up(candidates, pairs_of, keys);
        let taken_up = added.iter().zip(pairs).map(|(&(new, _), pair)| (new, pair)).collect();
        let tidy = shards_now.iter().any(|shard| shard.is_untidy());
        let dropped = std::mem::replace(dropped, Vec::with_capacity(dropped.len()));
        let outcome = Arc::new(Outcome { taken_up, dropped, tidy });
        for shard in &mut shards_now {
            shard.conclude(merge, outcome.clone());
        }
        drop(shards_now);
        if count >= PARALLEL_MERGES {
            shards.meanwhile(Shard::update_lists);
        }
        Ok(Rule { a, b, offset, count, offset_count, consistency })
    }

    /// Counts all pairs and indexes the frequent ones, with a threshold of at most `limit`.
    fn index(&mut self, limit: u64, interrupt: &Interrupt) -> Result<()> {
        let Self { options, threads, shards, .. } = self;
        // The lower the frequencies that can win, the more pairs, lest all be counted again.
        let halves = match options.merge_mode {
            _ if options.alpha > 0.5 => 4,
            MergeMode::Oriented => 3,
            MergeMode::Pair => 2,
        };
        let wanted = options.indexed_pairs.saturating_mul(halves) / 2;
        let parallel = self.num_tokens >= PARALLEL_CELLS;
        let mut all = shards.items();
        let (threshold, mut counts) = if all.iter().all(|shard| shard.canvas().is_single()) {
            let canvases: Vec<_> = all.iter().map(|shard| shard.canvas()).collect();
            let bounds = options.min_frequency..=limit;
            let found = Search { canvases: &canvases, wanted, bounds, threads, interrupt }.run();
            for (shard, (places, memory)) in all.iter_mut().zip(found.places) {
                shard.set_counted(places, memory);
            }
            drop(all);
            (found.threshold, found.counts)
        } else {
            drop(all);
            let bits = self.num_tokens.max(1).ilog2().clamp(10, MAX_SKETCH_BITS);
            let flag = interrupt.clone();
            shards.each(parallel, move |shard| shard.count_roughly(bits, &flag));
            interrupt.check()?;
            let all = shards.items();
            let sketch = Sketch::sum(all.iter().map(|shard| shard.sketch()));
            // Some more than the limit takes, so that the next count is not due after the next rule.
            let least = sketch.count(limit) / 4 * 5;
            let threshold = sketch.threshold(wanted.max(least)).min(limit).max(options.min_frequency);
            let reaching = sketch.reaching(threshold);
            drop((sketch, all));
            let flag = interrupt.clone();
            shards.each(parallel, move |shard| shard.count(&reaching, &flag));
            (threshold, shards.items().iter_mut().flat_map(|shard| shard.take_counts()).collect())
        };
        interrupt.check()?;

        self.threshold = threshold;
        self.pairs_of.iter_mut().for_each(Vec::clear);
        self.dropped.clear();
        add_up(&mut counts);
        counts.retain(|&(_, count)| count.all >= threshold);
        // With as many rules as the codebook has ids, one and a half times as many pairs come with them.
        self.candidates = Candidates::with_capacity(3 * counts.len());
        take_up(&mut self.candidates, &mut self.pairs_of, counts.iter().copied());
        let keys: Vec<_> = counts.into_iter().map(|(key, _)| key).collect();
        self.shards.each(parallel, move |shard| shard.index_counted(&keys));
        Ok(())
    }
}

/// An indexed pair as one of its tokens sees it.
#[derive(Debug, Clone, Copy)]
struct PairOf {
    pair: u32,
    other: u32,
    /// Whether the other token comes first.
    before: bool,
}

/// Makes pairs candidates and returns their indices.
fn take_up(
    candidates: &mut Candidates,
    pairs_of: &mut [Vec<PairOf>],
    counts: impl Iterator<Item = (u64, Count)>,
) -> Vec<u32> {
    let insert = |(key, count)| {
        let pair = candidates.insert(key, count);
        let (a, b) = tokens(key);
        pairs_of[a as usize].push(PairOf { pair, other: b, before: false });
        pairs_of[b as usize].push(PairOf { pair, other: a, before: true });
        pair
    };
    counts.map(insert).collect()
}

/// The new pairs at or above the threshold after a rule, and their counts. Each occurs `least` times in one of the shards;
/// some are `gone` already.
fn new_pairs<W: Word>(
    shards: &[MutexGuard<'_, Shard<W>>],
    gone: &[(NewPair, u64)],
    threshold: u64,
    least: u64,
) -> Vec<(NewPair, u64)> {
    let mut found = Vec::with_capacity(shards.iter().map(|shard| shard.frequent().len()).sum());
    for (number, shard) in shards.iter().enumerate() {
        for &new in shard.frequent() {
            if shards[..number].iter().any(|earlier| earlier.added(new) >= least) {
                continue;
            }
            let added: u64 = shards.iter().map(|shard| shard.added(new)).sum();
            let gone = gone.iter().filter(|(gone, _)| *gone == new).map(|(_, count)| count);
            let count = added - gone.sum::<u64>();
            if count >= threshold {
                found.push((new, count));
            }
        }
    }
    found
}

/// A pair with the number of its regions' cells.
fn sized(sizes: &[u64], index: u32, key: u64) -> Pair {
    let (a, b) = tokens(key);
    Pair { index, a, b, sizes: [a, b].map(|token| sizes[token as usize]) }
}

/// How often a pair occurs at which offset, in ascending order of offsets.
type Histogram = Vec<(Offset, u64)>;

/// Fills the histograms of indexed pairs.
fn count_offsets<W: Word>(
    shards: &Crew<Shard<W>>,
    batch: &[Fresh],
    sizes: &[u64],
    base_vocab_size: u32,
    histograms: &mut Vec<Histogram>,
    interrupt: &Interrupt,
) -> Result<()> {
    histograms.resize(histograms.len().max(batch.len()), Histogram::new());
    let (mut regions, mut occurrences) = (Vec::with_capacity(batch.len()), 0);
    for (number, (&Fresh { pair, key, count }, histogram)) in batch.iter().zip(&mut *histograms).enumerate() {
        let pair = sized(sizes, pair, key);
        histogram.clear();
        if pair.a.max(pair.b) < base_vocab_size {
            let Count { all, below } = count;
            let offsets = [(Offset { dy: 0, dx: 1 }, all - below), (Offset { dy: 1, dx: 0 }, below)];
            histogram.extend(offsets.into_iter().filter(|&(_, count)| count > 0));
        } else {
            regions.push((number, pair));
            occurrences += count.all;
        }
    }
    if regions.is_empty() {
        return Ok(());
    }
    let flag = interrupt.clone();
    shards.each(occurrences >= PARALLEL_OCCURRENCES, move |shard| shard.count_offsets(&regions, &flag));
    interrupt.check()?;
    for &((number, offset), count) in shards.items().iter().flat_map(|shard| shard.offsets()) {
        histograms[number].push((offset, count));
    }
    histograms[..batch.len()].iter_mut().for_each(add_up);
    let counted = |histogram: &Histogram| histogram.iter().map(|(_, count)| count).sum::<u64>();
    debug_assert!(
        batch.iter().zip(&*histograms).all(|(fresh, histogram)| counted(histogram) == fresh.count.all)
    );
    Ok(())
}

/// Sorts counts, of which there may be several of a kind, and makes them one of each.
fn add_up<K: Ord + Copy, C: AddAssign + Copy>(counts: &mut Vec<(K, C)>) {
    counts.sort_unstable_by_key(|&(kind, _)| kind);
    counts.dedup_by(|part, sum| {
        let same = part.0 == sum.0;
        if same {
            sum.1 += part.1;
        }
        same
    });
}
