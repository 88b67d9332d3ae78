//! The candidates, which are the indexed pairs, and the choice of the next merge among them.

use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::pair::Count;
use crate::error::Result;
use crate::grid::Offset;
use crate::memory::{self, prefetch};
use crate::statistics::priority;

/// What follows from a pair's histogram of offsets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evaluation {
    /// The pair's frequency: N in pair mode, the count at the most frequent offset in oriented mode.
    pub frequency: u64,
    /// The most frequent offset.
    pub offset: Offset,
    /// The count at that offset.
    pub offset_count: u64,
    /// Spatial consistency.
    pub consistency: f64,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    key: u64,
    count: Count,
    /// An upper bound of the frequency: once a bound, always one, since frequencies never rise.
    bound: u64,
    /// The number of its evaluation, or `NO_EVALUATION`.
    evaluation: u32,
    /// Whether that evaluation is of the current count.
    is_evaluated: bool,
}

const NO_EVALUATION: u32 = u32::MAX;

/// A pair to evaluate.
#[derive(Debug, Clone, Copy)]
pub(super) struct EvaluationRequest {
    pub pair: u32,
    pub key: u64,
    pub count: Count,
}

/// The candidate of the highest priority.
#[derive(Debug, Clone, Copy)]
pub(super) struct Winner {
    pub pair: u32,
    pub key: u64,
    pub count: u64,
    pub evaluation: Evaluation,
    pub priority: f64,
    pub max_frequency: u64,
}

/// What memory is for, in messages.
const CANDIDATES: &str = "the candidates for merges";

/// All indexed pairs, ordered so that the one of the highest priority is found without looking at most of them.
///
/// A pair's consistency is worked out when the pair comes near the top, and again after each change of its count:
/// consistency can rise while the count falls. So a candidate is either ranked, with an evaluation of its current
/// count, or it is queued by an upper bound of its frequency.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// By index.
    pairs: Vec<Candidate>,
    /// Per pair, whether it has not been dropped. Apart, because most pairs of a merge's tokens lose nothing by it.
    is_indexed: Vec<bool>,
    /// Of those pairs that were ever evaluated.
    evaluations: Vec<Evaluation>,
    /// The queued pairs, in buckets by an upper bound of their frequencies, and some that are ranked by now.
    queue: Vec<Vec<u32>>,
    /// The highest bucket of the queue that may not be empty.
    top: usize,
    /// The ranked pairs, in bands of consistency, so that in each band those of high priority have high frequencies.
    ranking: [Band; NUM_BANDS],
}

/// Per frequency: pairs by falling consistency (as bits, which have the same order), then by key.
type Band = BTreeMap<u64, BTreeSet<(Reverse<u64>, u64, u32)>>;

/// About how many pairs are evaluated at once: with more, more counts change before their evaluations are compared;
/// with fewer, threads are woken more often.
const BATCH_SIZE: usize = 64;

/// A power of two, so that bands have exact bounds.
const NUM_BANDS: usize = 16;

/// The band of a consistency.
fn band(consistency: f64) -> usize {
    ((consistency * NUM_BANDS as f64) as usize).min(NUM_BANDS - 1)
}

/// Bits of a count that tell buckets apart.
const BUCKET_BITS: u32 = 10;

/// The bucket of a count; buckets of counts below 2^`BUCKET_BITS` hold one count each.
fn bucket(count: u64) -> usize {
    let shift = (u64::BITS - count.leading_zeros()).saturating_sub(BUCKET_BITS);
    ((shift as usize) << (BUCKET_BITS - 1)) + (count >> shift) as usize
}

/// The largest count in a bucket.
fn bucket_end(bucket: usize) -> u64 {
    // Above the buckets of one count each, every `half` buckets double the number of counts in a bucket.
    let half = 1 << (BUCKET_BITS - 1);
    let shift = (bucket / half).saturating_sub(1);
    let mantissa = (bucket - shift * half) as u64;
    ((mantissa + 1) << shift) - 1
}

impl Candidates {
    /// No candidates, with room for some.
    pub fn with_capacity(number: usize) -> Result<Self> {
        let pairs = memory::with_capacity(number, CANDIDATES)?;
        let is_indexed = memory::with_capacity(number, CANDIDATES)?;
        Ok(Self { pairs, is_indexed, ..Self::default() })
    }

    /// Adds a pair and returns its index.
    pub fn insert(&mut self, key: u64, count: Count) -> Result<u32> {
        let pair = self.pairs.len() as u32;
        let bound = count.total;
        let candidate = Candidate { key, count, bound, evaluation: NO_EVALUATION, is_evaluated: false };
        memory::push(&mut self.pairs, candidate, CANDIDATES)?;
        memory::push(&mut self.is_indexed, true, CANDIDATES)?;
        self.enqueue(pair, bound)?;
        Ok(pair)
    }

    fn enqueue(&mut self, pair: u32, bound: u64) -> Result<()> {
        let bucket = bucket(bound);
        if self.queue.len() <= bucket {
            self.queue.resize_with(bucket + 1, Vec::new);
        }
        memory::push(&mut self.queue[bucket], pair, CANDIDATES)?;
        self.top = self.top.max(bucket);
        Ok(())
    }

    /// Whether a pair has not been dropped.
    pub fn is_indexed(&self, pair: u32) -> bool {
        self.is_indexed[pair as usize]
    }

    /// Begins to load what [`Candidates::remove`] needs.
    pub fn prefetch(&self, pair: u32) {
        prefetch(&self.pairs, pair as usize);
    }

    /// Lowers a pair's count. Drops the pair and returns false if its frequency must be below the threshold.
    pub fn remove(&mut self, pair: u32, removals: Count, threshold: u64) -> Result<bool> {
        let Candidate { key, count, bound, evaluation, is_evaluated } = &mut self.pairs[pair as usize];
        // The new bound is the last known frequency, or the count if that is lower.
        *count -= removals;
        let old_evaluation = std::mem::take(is_evaluated).then(|| self.evaluations[*evaluation as usize]);
        *bound = old_evaluation.map_or(*bound, |evaluation| evaluation.frequency).min(count.total);
        let (key, bound) = (*key, *bound);
        self.is_indexed[pair as usize] = bound >= threshold;
        if let Some(evaluation) = old_evaluation {
            self.unrank(pair, key, evaluation);
        }
        if bound < threshold {
            return Ok(false);
        }
        // A queued pair stays in the bucket of an earlier bound, which is higher and comes in time.
        if old_evaluation.is_some() {
            self.enqueue(pair, bound)?;
        }
        Ok(true)
    }

    fn rank(&mut self, pair: u32, key: u64, Evaluation { frequency, consistency, .. }: Evaluation) {
        let level = self.ranking[band(consistency)].entry(frequency).or_default();
        level.insert((Reverse(consistency.to_bits()), key, pair));
    }

    fn unrank(&mut self, pair: u32, key: u64, Evaluation { frequency, consistency, .. }: Evaluation) {
        if let Entry::Occupied(mut level) = self.ranking[band(consistency)].entry(frequency) {
            level.get_mut().remove(&(Reverse(consistency.to_bits()), key, pair));
            if level.get().is_empty() {
                level.remove();
            }
        }
    }

    /// The pair with the highest priority (ties: the smaller key). `evaluate` returns `None` for pairs to drop.
    ///
    /// Evaluates until none of the queued pairs could win even with full consistency. All of this is exact in floating
    /// point, because rounding keeps the order of what it rounds.
    pub fn find_winner(
        &mut self,
        alpha: f64,
        mut evaluate: impl FnMut(&[EvaluationRequest]) -> Result<Vec<Option<Evaluation>>>,
    ) -> Result<Option<Winner>> {
        loop {
            // The best of the ranked pairs wins if the queue is empty, or if its pairs can neither beat that priority
            // nor raise the maximum that frequencies are relative to.
            self.lower_top();
            let winner = self.find_ranked_winner(alpha);
            if self.top == 0 {
                return Ok(winner);
            }
            let bound = bucket_end(self.top);
            if let Some(Winner { priority: winning_priority, max_frequency, .. }) = winner
                && bound <= max_frequency
                && priority(bound, max_frequency, alpha, 1.0) < winning_priority
            {
                return Ok(winner);
            }
            // Otherwise the top of the queue is evaluated and ranked.
            let batch = self.dequeue_batch()?;
            for (request, evaluation) in batch.iter().zip(evaluate(&batch)?) {
                self.set_evaluation(request, evaluation)?;
            }
        }
    }

    /// Lowers the top of the queue to the highest bucket that is not empty.
    fn lower_top(&mut self) {
        while self.top > 0 && self.queue[self.top].is_empty() {
            self.top -= 1;
        }
    }

    /// Takes pairs out of the top buckets, one bucket after the other.
    fn dequeue_batch(&mut self) -> Result<Vec<EvaluationRequest>> {
        let mut batch = memory::with_capacity(2 * BATCH_SIZE, CANDIDATES)?;
        while self.top > 0 && (batch.is_empty() || batch.len() + self.queue[self.top].len() <= BATCH_SIZE) {
            // Of a bucket, skip pairs that were ranked or dropped since, and move those whose bound has fallen.
            for pair in std::mem::take(&mut self.queue[self.top]) {
                let Candidate { key, count, bound, is_evaluated, .. } = self.pairs[pair as usize];
                if is_evaluated || !self.is_indexed[pair as usize] {
                    continue;
                }
                if bucket(bound) < self.top {
                    self.enqueue(pair, bound)?;
                } else {
                    memory::push(&mut batch, EvaluationRequest { pair, key, count }, CANDIDATES)?;
                }
            }
            self.lower_top();
        }
        Ok(batch)
    }

    fn set_evaluation(
        &mut self,
        &EvaluationRequest { pair, key, .. }: &EvaluationRequest,
        evaluation: Option<Evaluation>,
    ) -> Result<()> {
        let Some(evaluation) = evaluation else {
            self.is_indexed[pair as usize] = false;
            return Ok(());
        };
        // A pair keeps its place among the evaluations for the next one.
        let candidate = &mut self.pairs[pair as usize];
        candidate.is_evaluated = true;
        if candidate.evaluation == NO_EVALUATION {
            candidate.evaluation = self.evaluations.len() as u32;
            memory::push(&mut self.evaluations, evaluation, CANDIDATES)?;
        }
        self.evaluations[candidate.evaluation as usize] = evaluation;
        self.rank(pair, key, evaluation);
        Ok(())
    }

    /// The ranked pair with the highest priority. In each band, walks from high frequencies to low ones until no lower
    /// one can win.
    fn find_ranked_winner(&self, alpha: f64) -> Option<Winner> {
        let most_frequent = self.ranking.iter().filter_map(|band| band.last_key_value());
        let max_frequency = *most_frequent.map(|(frequency, _)| frequency).max()?;
        let mut winner: Option<(f64, Reverse<u64>, u32)> = None;
        for (band, levels) in self.ranking.iter().enumerate().rev() {
            // Bands of high consistency first: their winner leaves less to look at in the others.
            let max_consistency = (band + 1) as f64 / NUM_BANDS as f64;
            for (&frequency, level) in levels.iter().rev() {
                // An upper bound of the priorities in this band, for this frequency and lower ones.
                let bound = priority(frequency, max_frequency, alpha, max_consistency);
                if winner.is_some_and(|(winning_priority, ..)| bound < winning_priority) {
                    break;
                }
                // Of one frequency, pairs by falling consistency, as long as they can win.
                let mut next = level.first();
                while let Some(&(consistency, key, pair)) = next {
                    let priority = priority(frequency, max_frequency, alpha, f64::from_bits(consistency.0));
                    if winner.is_some_and(|(winning_priority, ..)| priority < winning_priority) {
                        break;
                    }
                    if winner.is_none_or(|winner| (priority, Reverse(key)) > (winner.0, winner.1)) {
                        winner = Some((priority, Reverse(key), pair));
                    }
                    // Another consistency may give the same priority; of one consistency, the first pair has the
                    // smallest key.
                    let end_of_consistency = (consistency, u64::MAX, u32::MAX);
                    next = level.range((Bound::Excluded(end_of_consistency), Bound::Unbounded)).next();
                }
            }
        }
        let (priority, Reverse(key), pair) = winner?;
        let Candidate { count, evaluation, .. } = self.pairs[pair as usize];
        let evaluation = self.evaluations[evaluation as usize];
        Some(Winner { pair, key, count: count.total, evaluation, priority, max_frequency })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_the_order_of_counts() {
        assert_eq!((bucket(0), bucket_end(0)), (0, 0));
        for count in (1..5000).chain((2..64).map(|bits| u64::MAX >> bits)) {
            assert!(bucket(count - 1) <= bucket(count));
            assert!(count <= bucket_end(bucket(count)));
            assert!(bucket(bucket_end(bucket(count))) == bucket(count), "{count}");
            assert!(bucket(bucket_end(bucket(count)) + 1) > bucket(count));
        }
    }
}
