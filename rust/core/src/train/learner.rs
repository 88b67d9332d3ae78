//! The loop of training: selects a merge, lets the shards apply it, and keeps all counts up to date. The numbers of
//! steps are those of the algorithm in `train/mod.rs`.

use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard};

use super::assign::GridAssigner;
use super::candidates::{Candidates, Evaluation, EvaluationRequest, Winner};
use super::count_cells::CellPairSearch;
use super::count_regions::Sketch;
use super::merge::{MergeStep, PAIRS_OF_A, PAIRS_OF_B, RemovedPair};
use super::options::TrainOptions;
use super::pair::{Count, NewPair, Pair, new_pair, new_pair_key};
use super::regions::RegionMap;
use super::shard::{ListUpdate, Shard};
use super::word::{Word, Word32};
use crate::encode::{EncodeOptions, Encoder};
use crate::error::Result;
use crate::grid::{Grid, Offset};
use crate::interrupt::Interrupt;
use crate::memory;
use crate::statistics::{consistency, key, most_frequent_offset, tokens};
use crate::threads::Threads;
use crate::vocabulary::{Merge, MergeMode};
use crate::workers::Workers;

/// With fewer occurrences than this, merging a pair is not worth handing to threads.
const MIN_PARALLEL_MERGES: u64 = 1 << 7;

/// With fewer occurrences than this, neither is counting pairs' offsets.
const MIN_PARALLEL_OCCURRENCES: u64 = 1 << 9;

/// With fewer cells than this, counting all pairs is not worth waking threads for.
const MIN_PARALLEL_CELLS: u64 = 1 << 14;

/// Most bits of the hashes that pairs are counted by.
const MAX_SKETCH_BITS: u32 = 22;

/// With fewer cells than this, a shard is not worth a thread, unless the options ask for that many threads.
const MIN_SHARD_CELLS: u64 = 1 << 21;

/// Most cells of a shard before its last grid is added. With that grid there are fewer than 2^31 cells, so positions
/// and all counts within a shard fit 32 bits.
const MAX_SHARD_CELLS: u64 = 1 << 30;

/// What memory is for, in messages.
const SHARDS: &str = "the parts of the grids";
const PAIRS: &str = "the pairs of the tokens";
const COUNTS: &str = "the counts of pairs";

/// Learns merges, whatever the words are that cells are kept in.
pub(super) trait MergeLearner: Send + Sync {
    /// Fills grid `first` and those after it, encoded if there is an encoder.
    fn set_grids(&self, first: usize, grids: &[Grid], encoder: Option<&Encoder>) -> Result<()>;
    /// Counts all pairs; these merges have been applied to the grids.
    fn count_all(&mut self, merges: &[Merge], interrupt: &Interrupt) -> Result<()>;
    /// Selects and applies one merge; `None` if no candidate is left.
    fn learn_merge(&mut self, interrupt: &Interrupt) -> Result<Option<Merge>>;
    /// Length of all grids in tokens.
    fn num_tokens(&self) -> u64;
    fn start_threads(&mut self) -> Result<()>;
    fn stop_threads(&mut self);
}

/// A learner for grids of these (heights, widths), with the smallest words that fit.
pub(super) fn new(sizes: &[(u32, u32)], options: &TrainOptions) -> Result<Box<dyn MergeLearner>> {
    let positions = sizes.iter().map(|&(height, width)| RegionMap::<u64>::num_positions(height, width));
    let max_positions = positions.max().unwrap_or(0);
    let tokens = options.base_vocab_size + options.num_merges as u32;
    Ok(if Word32::<15>::fits(tokens, max_positions) {
        Box::new(Learner::<Word32<15>>::new(sizes, options)?)
    } else if Word32::<18>::fits(tokens, max_positions) {
        Box::new(Learner::<Word32<18>>::new(sizes, options)?)
    } else {
        Box::new(Learner::<u64>::new(sizes, options)?)
    })
}

struct Learner<W: Word> {
    options: TrainOptions,
    /// For work that is not shard by shard.
    threads: Threads,
    shards: Workers<Shard<W>>,
    assigner: Mutex<GridAssigner>,
    num_tokens: u64,
    candidates: Candidates,
    /// The histograms of the pairs evaluated last, and memory for others.
    histograms: Vec<Histogram>,
    /// Pairs dropped since the last merge, whose lists are no longer needed.
    dropped_pairs: Vec<u32>,
    /// Per token, the indexed pairs that contain it, and some that no longer are indexed. A pair of twice the same
    /// token is there twice.
    pairs_of_token: Vec<Vec<PairOfToken>>,
    /// Every pair with at least this frequency is indexed.
    threshold: u64,
    /// Per token, the most cells that a region of it has.
    max_sizes: Vec<u64>,
}

/// An indexed pair as one of its tokens sees it.
#[derive(Debug, Clone, Copy)]
struct PairOfToken {
    pair: u32,
    other_token: u32,
    /// Whether the other token comes first.
    before: bool,
}

/// How often a pair occurs at which offset, in ascending order of offsets.
type Histogram = Vec<(Offset, u64)>;

impl<W: Word> MergeLearner for Learner<W> {
    fn set_grids(&self, first: usize, grids: &[Grid], encoder: Option<&Encoder>) -> Result<()> {
        let places = self.assigner.lock().expect("no thread panicked").assign(first, grids)?;
        for (grid, (shard, position)) in grids.iter().zip(places) {
            let shard = || self.shards.lock(shard as usize);
            match encoder {
                None => shard().set_grid(position, grid.width(), grid.ids()),
                Some(encoder) => {
                    let options = EncodeOptions { regions: true, ..EncodeOptions::default() };
                    let encoding = encoder.encode(grid, &options, &Interrupt::default())?;
                    shard().set_encoded_grid(position, grid.width(), &encoding)?;
                }
            }
        }
        Ok(())
    }

    fn count_all(&mut self, merges: &[Merge], interrupt: &Interrupt) -> Result<()> {
        for merge in merges {
            let pair = Pair::new(0, key(merge.a, merge.b), &self.max_sizes);
            memory::push(&mut self.max_sizes, pair.max_size(), PAIRS)?;
        }
        self.pairs_of_token = memory::try_vec(self.max_sizes.len(), Vec::new(), PAIRS)?;
        self.num_tokens = self.shards.lock_all().iter().map(|shard| shard.num_regions()).sum();
        self.index(u64::MAX, interrupt)
    }

    fn learn_merge(&mut self, interrupt: &Interrupt) -> Result<Option<Merge>> {
        self.select(interrupt)?.map(|winner| self.apply(&winner, interrupt)).transpose()
    }

    fn num_tokens(&self) -> u64 {
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
    /// Makes room for grids in shards of about equal numbers of cells.
    fn new(sizes: &[(u32, u32)], options: &TrainOptions) -> Result<Self> {
        let threads = Threads::new(options.num_threads)?;
        let tokens = options.base_vocab_size + options.num_merges as u32;
        // Few cells make one shard, which needs no threads; very many make more shards than threads.
        let num_cells: u64 =
            sizes.iter().map(|&(height, width)| RegionMap::<W>::num_positions(height, width)).sum();
        let max_shards = if options.num_threads == 0 { num_cells / MIN_SHARD_CELLS } else { u64::MAX };
        let num_shards = max_shards.clamp(1, threads.count() as u64).max(num_cells.div_ceil(MAX_SHARD_CELLS));
        let mut shard_sizes = split_into_shards::<W>(sizes, num_shards)?;
        let new_shard = |(positions, members): &mut ShardSize| {
            let mut shard = Shard::new(options.base_vocab_size, tokens)?;
            shard.reserve(*positions)?;
            let mut positions = memory::with_capacity(members.len(), SHARDS)?;
            for &size in &*members {
                positions.push((size, shard.add_grid(size.0, size.1)?));
            }
            Ok((shard, positions))
        };
        let shards = threads.map(&mut shard_sizes, num_cells >= MIN_PARALLEL_CELLS, new_shard)?;
        let (shards, positions): (Vec<_>, Vec<_>) = shards.into_iter().unzip();
        let free_positions = (0..).zip(positions).flat_map(|(shard, positions)| {
            positions.into_iter().map(move |(size, position)| (size, (shard, position)))
        });
        let assigner = GridAssigner::new(options.base_vocab_size, sizes.len(), shards.len(), free_positions)?;
        Ok(Self {
            options: options.clone(),
            shards: Workers::new(shards, threads.count())?,
            threads,
            assigner: Mutex::new(assigner),
            num_tokens: 0,
            candidates: Candidates::default(),
            histograms: Vec::new(),
            dropped_pairs: Vec::new(),
            pairs_of_token: Vec::new(),
            threshold: u64::MAX,
            max_sizes: memory::try_vec(options.base_vocab_size as usize, 1, PAIRS)?,
        })
    }

    /// Step 2: selects the candidate with the highest priority, of all pairs.
    fn select(&mut self, interrupt: &Interrupt) -> Result<Option<Winner>> {
        loop {
            let winner = self.select_indexed(interrupt)?;
            let max_missing = self.threshold - 1;
            if max_missing < self.options.min_frequency {
                return Ok(winner);
            }
            // Below this frequency no pair that is not indexed can win, even one of full consistency.
            let min_winning = match winner {
                Some(Winner { priority, max_frequency, .. }) => {
                    if max_missing as f64 / max_frequency as f64 + self.options.alpha < priority {
                        return Ok(winner);
                    }
                    ((priority - self.options.alpha) * max_frequency as f64).max(0.0) as u64
                }
                None => self.threshold / 2,
            };
            self.index(min_winning.min(max_missing), interrupt)?;
        }
    }

    /// Selects the candidate with the highest priority, of the indexed pairs.
    fn select_indexed(&mut self, interrupt: &Interrupt) -> Result<Option<Winner>> {
        let Self { options, shards, candidates, histograms, dropped_pairs, threshold, max_sizes, .. } = self;
        let evaluate = |batch: &[EvaluationRequest]| {
            count_offsets(shards, batch, max_sizes, options.base_vocab_size, histograms, interrupt)?;
            // From the histogram follow frequency, offset and consistency; pairs that have become too rare are dropped.
            let evaluation = |(request, histogram): (&EvaluationRequest, &Histogram)| {
                let (offset, offset_count) = most_frequent_offset(histogram);
                let frequency = match options.merge_mode {
                    MergeMode::Pair => request.count.total,
                    MergeMode::Oriented => offset_count,
                };
                if frequency < *threshold {
                    memory::push(dropped_pairs, request.pair, PAIRS)?;
                    return Ok(None);
                }
                let consistency = consistency(histogram, options.sigma);
                Ok(Some(Evaluation { frequency, offset, offset_count, consistency }))
            };
            batch.iter().zip(&*histograms).map(evaluation).collect()
        };
        candidates.find_winner(options.alpha, evaluate)
    }

    /// Steps 3 and 4: makes the winner a merge, applies it to every grid and updates all counts.
    fn apply(&mut self, winner: &Winner, interrupt: &Interrupt) -> Result<Merge> {
        let Winner { pair, key, count, evaluation, .. } = *winner;
        let Evaluation { offset, offset_count, consistency, .. } = evaluation;
        let (a, b) = tokens(key);
        let offset = (self.options.merge_mode == MergeMode::Oriented).then_some(offset);
        let token = self.pairs_of_token.len() as u32;
        // The new token.
        memory::push(&mut self.pairs_of_token, Vec::new(), PAIRS)?;
        let pair = Pair::new(pair, key, &self.max_sizes);
        memory::push(&mut self.max_sizes, pair.max_size(), PAIRS)?;
        let step = MergeStep { pair, offset, token };

        // Apply the merge to all shards.
        let removed_pairs = self.removed_pairs(step)?;
        // A pair at the threshold occurs at least so often in one of the shards.
        let min_count = self.threshold.div_ceil(self.shards.len() as u64);
        let flag = interrupt.clone();
        let is_parallel = count >= MIN_PARALLEL_MERGES;
        self.shards
            .for_each(is_parallel, move |shard| shard.apply(step, &removed_pairs, min_count, &flag))?;
        interrupt.check()?;

        // Add up what it has changed, and let the other threads update their lists while the next merge is selected.
        self.update_candidates(step, min_count)?;
        if is_parallel {
            self.shards.run_in_background(Shard::update_lists);
        }
        Ok(Merge { a, b, offset, count, offset_count, consistency })
    }

    /// The pairs that a merge may take away: the indexed pairs of its two tokens, then the four pairs of these with the
    /// new token.
    fn removed_pairs(&self, step: MergeStep) -> Result<Vec<RemovedPair>> {
        let pairs_of = |token: u32| &self.pairs_of_token[token as usize];
        let number: usize = merged_tokens(step.pair).map(|(token, _)| pairs_of(token).len()).sum();
        let mut removed_pairs = memory::with_capacity(number + 4, PAIRS)?;
        for (token, index) in merged_tokens(step.pair) {
            for &PairOfToken { pair, other_token, before } in pairs_of(token) {
                self.candidates.prefetch(pair);
                removed_pairs.push((other_token, index + usize::from(before)));
            }
        }
        removed_pairs.extend((0..4).map(|index| (step.token, index)));
        Ok(removed_pairs)
    }

    /// Adds up what a merge has changed in all shards: lowers the counts of candidates, indexes new pairs, and tells
    /// the shards how their lists change.
    fn update_candidates(&mut self, step: MergeStep, min_count: u64) -> Result<()> {
        let Self { shards, num_tokens, candidates, dropped_pairs, pairs_of_token, threshold, .. } = self;
        let mut shards = shards.lock_all();
        *num_tokens -= shards.iter().map(|shard| shard.num_merges()).sum::<u64>();

        // In the order of `removed_pairs`, first the indexed pairs.
        let (mut number, mut memory) = (0, Ok(()));
        for (token, _) in merged_tokens(step.pair) {
            pairs_of_token[token as usize].retain(|&PairOfToken { pair, .. }| {
                let mut removals = Count::default();
                for shard in &shards {
                    removals += shard.removals(number);
                }
                number += 1;
                let is_kept = candidates.is_indexed(pair)
                    && (removals == Count::default()
                        || candidates.remove(pair, removals, *threshold).unwrap_or_else(|error| {
                            memory = Err(error);
                            true
                        }));
                if !is_kept && let Err(error) = memory::push(dropped_pairs, pair, PAIRS) {
                    memory = Err(error);
                }
                is_kept
            });
        }
        memory?;
        // Then the new pairs that later joins of the same merge have taken away again.
        let Pair { a, b, .. } = step.pair;
        let new_pair_removals =
            [(a, true), (a, false), (b, true), (b, false)].map(|(other_token, before)| {
                let removals = shards.iter().map(|shard| shard.removals(number).total).sum();
                number += 1;
                (new_pair(other_token, before), removals)
            });

        // Index the new pairs that are frequent.
        let new_pairs = frequent_new_pairs(&shards, &new_pair_removals, *threshold, min_count)?;
        let counts = new_pairs
            .iter()
            .map(|&(pair, total)| (new_pair_key(step.token, pair), Count { total, below: 0 }));
        let indices = insert_candidates(candidates, pairs_of_token, counts)?;
        let new_lists = new_pairs.iter().zip(indices).map(|(&(pair, _), index)| (pair, index));
        let new_lists = memory::collect(new_lists, PAIRS)?;
        // The lists of all shards follow.
        let compact = shards.iter().any(|shard| shard.should_compact());
        let empty_list = memory::with_capacity(dropped_pairs.len(), PAIRS)?;
        let dropped_lists = std::mem::replace(dropped_pairs, empty_list);
        let update = Arc::new(ListUpdate { new_lists, dropped_lists, compact });
        for shard in &mut shards {
            shard.schedule_update(step, update.clone());
        }
        Ok(())
    }

    /// Step 1: counts all pairs and indexes the frequent ones, with a threshold of at most `limit`.
    fn index(&mut self, limit: u64, interrupt: &Interrupt) -> Result<()> {
        // With lower frequencies that can win, more pairs are indexed, so that the next count comes later.
        let halves = match self.options.merge_mode {
            _ if self.options.alpha > 0.5 => 4,
            MergeMode::Oriented => 3,
            MergeMode::Pair => 2,
        };
        let target = self.options.indexed_pairs.saturating_mul(halves) / 2;
        let is_parallel = self.num_tokens >= MIN_PARALLEL_CELLS;
        let has_only_cells = self.shards.lock_all().iter().all(|shard| shard.regions().has_only_cells());
        let (threshold, mut counts) = if has_only_cells {
            self.count_cell_pairs(target, limit, interrupt)?
        } else {
            self.count_region_pairs(target, limit, is_parallel, interrupt)?
        };
        interrupt.check()?;

        // Start again with the pairs at or above the threshold.
        self.threshold = threshold;
        self.pairs_of_token.iter_mut().for_each(Vec::clear);
        self.dropped_pairs.clear();
        sum_by_key(&mut counts);
        counts.retain(|&(_, count)| count.total >= threshold);
        // With as many merges as the codebook has ids, one and a half times as many pairs come with them.
        self.candidates = Candidates::with_capacity(3 * counts.len())?;
        insert_candidates(&mut self.candidates, &mut self.pairs_of_token, counts.iter().copied())?;
        let keys: Vec<_> = memory::collect(counts.into_iter().map(|(key, _)| key), PAIRS)?;
        self.shards.for_each(is_parallel, move |shard| shard.build_lists(&keys))
    }

    /// Counts all pairs while every cell is a region of its own. Returns a threshold, and the counts of the pairs that
    /// reach it.
    fn count_cell_pairs(
        &self,
        target: usize,
        limit: u64,
        interrupt: &Interrupt,
    ) -> Result<(u64, Vec<(u64, Count)>)> {
        let Self { options, threads, .. } = self;
        let mut shards = self.shards.lock_all();
        let region_maps: Vec<_> = shards.iter().map(|shard| shard.regions()).collect();
        let bounds = options.min_frequency..=limit;
        let pairs = CellPairSearch { region_maps: &region_maps, target, bounds, threads, interrupt }.run()?;
        for ((shard, occurrences), memory) in shards.iter_mut().zip(pairs.occurrences).zip(pairs.memory) {
            shard.set_occurrences(occurrences, memory);
        }
        Ok((pairs.threshold, pairs.counts))
    }

    /// Counts all pairs of regions. Returns a threshold, and the counts of the pairs that may reach it, shard by shard.
    fn count_region_pairs(
        &self,
        target: usize,
        limit: u64,
        is_parallel: bool,
        interrupt: &Interrupt,
    ) -> Result<(u64, Vec<(u64, Count)>)> {
        // By hash.
        let bits = self.num_tokens.max(1).ilog2().clamp(10, MAX_SKETCH_BITS);
        let flag = interrupt.clone();
        self.shards.for_each(is_parallel, move |shard| shard.count_by_hash(bits, &flag))?;
        interrupt.check()?;
        // The threshold that the target takes, or some more pairs than the limit takes, so that the next count is not
        // due after the next merge.
        let shards = self.shards.lock_all();
        let sketch = Sketch::sum(shards.iter().map(|shard| shard.sketch()))?;
        let min_pairs = sketch.num_reaching(limit) / 4 * 5;
        let threshold = sketch.threshold(target.max(min_pairs))?.min(limit).max(self.options.min_frequency);
        let frequent_hashes = sketch.bits_reaching(threshold)?;
        drop((sketch, shards));
        // Exactly.
        let flag = interrupt.clone();
        let max_cells = self.max_sizes.iter().copied().max().unwrap_or(1);
        self.shards
            .for_each(is_parallel, move |shard| shard.count_frequent(&frequent_hashes, max_cells, &flag))?;
        let mut counts = Vec::new();
        for shard in &mut self.shards.lock_all() {
            memory::extend(&mut counts, shard.take_counts(), COUNTS)?;
        }
        Ok((threshold, counts))
    }
}

/// A number of positions, and the sizes of grids.
type ShardSize = (u64, Vec<(u32, u32)>);

/// Parts grids among shards of about equal numbers of positions: that number, and the grids' sizes. In a shard, grids
/// of one width are together.
fn split_into_shards<W: Word>(sizes: &[(u32, u32)], num_shards: u64) -> Result<Vec<ShardSize>> {
    let mut shards = vec![(0, Vec::new()); sizes.len().min(num_shards as usize)];
    // By width, and in their order; each grid to the shard with the fewest positions.
    let mut order = memory::collect((0_u32..).zip(sizes).map(|(grid, &(_, width))| (width, grid)), SHARDS)?;
    order.sort_unstable();
    for (width, grid) in order {
        let (height, _) = sizes[grid as usize];
        let (positions, members) =
            shards.iter_mut().min_by_key(|(positions, _)| *positions).expect("a shard for a grid");
        *positions += RegionMap::<W>::num_positions(height, width);
        memory::push(members, (height, width), SHARDS)?;
    }
    Ok(shards)
}

/// The tokens of a merge's pair, each once, with the index of their removals.
fn merged_tokens(Pair { a, b, .. }: Pair) -> impl Iterator<Item = (u32, usize)> {
    [(a, PAIRS_OF_A), (b, PAIRS_OF_B)].into_iter().take(if a == b { 1 } else { 2 })
}

/// Makes pairs candidates and returns their indices.
fn insert_candidates(
    candidates: &mut Candidates,
    pairs_of_token: &mut [Vec<PairOfToken>],
    counts: impl Iterator<Item = (u64, Count)>,
) -> Result<Vec<u32>> {
    let mut indices = memory::with_capacity(counts.size_hint().0, PAIRS)?;
    for (key, count) in counts {
        let pair = candidates.insert(key, count)?;
        let (a, b) = tokens(key);
        let pair_of = |other_token, before| PairOfToken { pair, other_token, before };
        memory::push(&mut pairs_of_token[a as usize], pair_of(b, false), PAIRS)?;
        memory::push(&mut pairs_of_token[b as usize], pair_of(a, true), PAIRS)?;
        memory::push(&mut indices, pair, PAIRS)?;
    }
    Ok(indices)
}

/// The new pairs at or above the threshold after a merge, and their counts. Each occurs at least `min_count` times in
/// one of the shards. Some have `removals` already.
fn frequent_new_pairs<W: Word>(
    shards: &[MutexGuard<'_, Shard<W>>],
    removals: &[(NewPair, u64)],
    threshold: u64,
    min_count: u64,
) -> Result<Vec<(NewPair, u64)>> {
    let number = shards.iter().map(|shard| shard.frequent_pairs().len()).sum();
    let mut pairs = memory::with_capacity(number, PAIRS)?;
    for (number, shard) in shards.iter().enumerate() {
        for &pair in shard.frequent_pairs() {
            // An earlier shard has named it, too.
            if shards[..number].iter().any(|earlier_shard| earlier_shard.num_added(pair) >= min_count) {
                continue;
            }
            let num_added: u64 = shards.iter().map(|shard| shard.num_added(pair)).sum();
            let num_removed = removals.iter().filter(|(other, _)| *other == pair).map(|(_, number)| number);
            let count = num_added - num_removed.sum::<u64>();
            if count >= threshold {
                pairs.push((pair, count));
            }
        }
    }
    Ok(pairs)
}

/// Fills the histograms of indexed pairs.
fn count_offsets<W: Word>(
    shards: &Workers<Shard<W>>,
    batch: &[EvaluationRequest],
    max_sizes: &[u64],
    base_vocab_size: u32,
    histograms: &mut Vec<Histogram>,
    interrupt: &Interrupt,
) -> Result<()> {
    // Single cells at once, other pairs by their lists.
    memory::lengthen(histograms, batch.len(), Histogram::new(), COUNTS)?;
    let (mut region_pairs, mut num_occurrences) = (memory::with_capacity(batch.len(), COUNTS)?, 0);
    for (number, (&EvaluationRequest { pair, key, count }, histogram)) in
        batch.iter().zip(&mut *histograms).enumerate()
    {
        let pair = Pair::new(pair, key, max_sizes);
        histogram.clear();
        if pair.a.max(pair.b) < base_vocab_size {
            // The count of two single cells is its histogram.
            let Count { total, below } = count;
            let offsets = [(Offset { dy: 0, dx: 1 }, total - below), (Offset { dy: 1, dx: 0 }, below)];
            histogram.extend(offsets.into_iter().filter(|&(_, count)| count > 0));
        } else {
            region_pairs.push((number, pair));
            num_occurrences += count.total;
        }
    }
    if region_pairs.is_empty() {
        return Ok(());
    }
    let flag = interrupt.clone();
    let is_parallel = num_occurrences >= MIN_PARALLEL_OCCURRENCES;
    shards.for_each(is_parallel, move |shard| shard.count_offsets(&region_pairs, &flag))?;
    interrupt.check()?;
    // Add up the counts of all shards.
    for &((number, offset), count) in shards.lock_all().iter().flat_map(|shard| shard.offset_counts()) {
        memory::push(&mut histograms[number], (offset, count), COUNTS)?;
    }
    histograms[..batch.len()].iter_mut().for_each(sum_by_key);
    let sum = |histogram: &Histogram| histogram.iter().map(|(_, count)| count).sum::<u64>();
    debug_assert!(
        batch.iter().zip(&*histograms).all(|(request, histogram)| sum(histogram) == request.count.total)
    );
    Ok(())
}

/// Sorts counts, of which there may be several with the same key, and makes them one sum per key.
fn sum_by_key<K: Ord + Copy, C: AddAssign + Copy>(counts: &mut Vec<(K, C)>) {
    counts.sort_unstable_by_key(|&(key, _)| key);
    counts.dedup_by(|next, sum| {
        let is_same = next.0 == sum.0;
        if is_same {
            sum.1 += next.1;
        }
        is_same
    });
}
