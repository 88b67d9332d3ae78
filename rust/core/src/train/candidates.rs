//! The indexed pairs and the choice of the next one.

use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::count_regions::Count;
use crate::error::Result;
use crate::grid::Offset;
use crate::memory::prefetch;
use crate::statistics::priority;

/// What a pair's histogram says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evaluation {
    /// What counts as the pair's frequency: N, or the count at the most frequent offset.
    pub frequency: u64,
    /// The most frequent offset.
    pub offset: Offset,
    /// The count at that offset.
    pub offset_count: u64,
    /// Spatial consistency.
    pub consistency: f64,
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    key: u64,
    count: Count,
    /// The frequency is no higher: it was no higher before, and it never rises.
    bound: u64,
    /// Where its evaluation is, or `NONE`.
    evaluation: u32,
    /// Whether it still holds.
    evaluated: bool,
}

const NONE: u32 = u32::MAX;

/// A pair to evaluate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fresh {
    pub pair: u32,
    pub key: u64,
    pub count: Count,
}

/// The winner among indexed pairs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Best {
    pub pair: u32,
    pub key: u64,
    pub count: u64,
    pub evaluation: Evaluation,
    pub priority: f64,
    pub max_frequency: u64,
}

/// All indexed pairs, ordered so that the best is found without looking at most of them.
///
/// A pair's consistency is worked out when the pair comes near the top, and again after each change of its count:
/// consistency can rise while the count falls.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pairs: Vec<Pair>,
    /// Per pair, whether it has not been dropped. Apart, because most pairs of a rule's tokens lose nothing by it.
    indexed: Vec<bool>,
    /// Of those pairs that were ever evaluated.
    evaluations: Vec<Evaluation>,
    /// Pairs without an evaluation, by an upper bound of their frequencies, and some that have one by now.
    fresh: Vec<Vec<u32>>,
    /// No bucket above this one holds anything.
    top: usize,
    /// The evaluated pairs, in bands of consistency, so that in each band those of high priority have high frequencies.
    ranked: [Band; BANDS],
}

/// Per frequency: pairs by falling consistency (as bits, which have the same order), then by key.
type Band = BTreeMap<u64, BTreeSet<(Reverse<u64>, u64, u32)>>;

/// About how many pairs are evaluated at once. Then threads are not needed for each, and few counts change before they are
/// compared.
const BATCH: usize = 64;

/// A power of two, so that bands have exact bounds.
const BANDS: usize = 16;

/// The band of a consistency.
fn band(consistency: f64) -> usize {
    ((consistency * BANDS as f64) as usize).min(BANDS - 1)
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
    let half = 1 << (BUCKET_BITS - 1);
    let shift = (bucket / half).saturating_sub(1);
    let mantissa = (bucket - shift * half) as u64;
    ((mantissa + 1) << shift) - 1
}

impl Candidates {
    /// None, with room for some pairs.
    pub fn with_capacity(pairs: usize) -> Self {
        Self { pairs: Vec::with_capacity(pairs), indexed: Vec::with_capacity(pairs), ..Self::default() }
    }

    /// Takes up a pair and returns its index.
    pub fn insert(&mut self, key: u64, count: Count) -> u32 {
        let pair = self.pairs.len() as u32;
        self.pairs.push(Pair { key, count, bound: count.all, evaluation: NONE, evaluated: false });
        self.indexed.push(true);
        self.push_fresh(pair, count.all);
        pair
    }

    fn push_fresh(&mut self, pair: u32, bound: u64) {
        let bucket = bucket(bound);
        if self.fresh.len() <= bucket {
            self.fresh.resize_with(bucket + 1, Vec::new);
        }
        self.fresh[bucket].push(pair);
        self.top = self.top.max(bucket);
    }

    /// Whether a pair has not been dropped.
    pub fn is_indexed(&self, pair: u32) -> bool {
        self.indexed[pair as usize]
    }

    /// Begins to fetch what [`Candidates::remove`] needs.
    pub fn fetch(&self, pair: u32) {
        prefetch(&self.pairs, pair as usize);
    }

    /// Lowers a pair's count. Drops the pair and returns false if its frequency must be below the threshold.
    pub fn remove(&mut self, pair: u32, removed: Count, threshold: u64) -> bool {
        let Pair { key, count, bound, evaluation, evaluated } = &mut self.pairs[pair as usize];
        *count -= removed;
        let before = std::mem::take(evaluated).then(|| self.evaluations[*evaluation as usize]);
        *bound = before.map_or(*bound, |before| before.frequency).min(count.all);
        let (key, bound) = (*key, *bound);
        self.indexed[pair as usize] = bound >= threshold;
        if let Some(before) = before {
            self.withdraw(pair, key, before);
        }
        if bound < threshold {
            return false;
        }
        // Without an evaluation, the pair waits in the bucket of a bound that it had, which is looked at in time.
        if before.is_some() {
            self.push_fresh(pair, bound);
        }
        true
    }

    fn rank(&mut self, pair: u32, key: u64, Evaluation { frequency, consistency, .. }: Evaluation) {
        let level = self.ranked[band(consistency)].entry(frequency).or_default();
        level.insert((Reverse(consistency.to_bits()), key, pair));
    }

    fn withdraw(&mut self, pair: u32, key: u64, Evaluation { frequency, consistency, .. }: Evaluation) {
        if let Entry::Occupied(mut level) = self.ranked[band(consistency)].entry(frequency) {
            level.get_mut().remove(&(Reverse(consistency.to_bits()), key, pair));
            if level.get().is_empty() {
                level.remove();
            }
        }
    }

    /// The pair with the highest priority; `evaluate` says of each whether `None`, to drop it.
    ///
    /// Evaluates until none of the others could win even with full consistency. All of this is exact in floating
    /// point, because rounding keeps the order of what it rounds.
    pub fn best(
        &mut self,
        alpha: f64,
        mut evaluate: impl FnMut(&[Fresh]) -> Result<Vec<Option<Evaluation>>>,
    ) -> Result<Option<Best>> {
        loop {
            self.lower_top();
            let best = self.best_ranked(alpha);
            if self.top == 0 {
                return Ok(best);
            }
            let bound = bucket_end(self.top);
            if let Some(Best { priority: reached, max_frequency, .. }) = best
                && bound <= max_frequency
                && priority(bound, max_frequency, alpha, 1.0) < reached
            {
                return Ok(best);
            }
            let batch = self.take_fresh();
            for (fresh, evaluation) in batch.iter().zip(evaluate(&batch)?) {
                self.set_evaluation(fresh, evaluation);
            }
        }
    }

    fn lower_top(&mut self) {
        while self.top > 0 && self.fresh[self.top].is_empty() {
            self.top -= 1;
        }
    }

    /// Takes pairs out of the top buckets, one bucket after the other.
    fn take_fresh(&mut self) -> Vec<Fresh> {
        let mut batch = Vec::with_capacity(2 * BATCH);
        while self.top > 0 && (batch.is_empty() || batch.len() + self.fresh[self.top].len() <= BATCH) {
            for pair in std::mem::take(&mut self.fresh[self.top]) {
                let Pair { key, count, bound, evaluated, .. } = self.pairs[pair as usize];
                if evaluated || !self.indexed[pair as usize] {
                    continue;
                }
                if bucket(bound) < self.top {
                    self.push_fresh(pair, bound);
                } else {
                    batch.push(Fresh { pair, key, count });
                }
            }
            self.lower_top();
        }
        batch
    }

    fn set_evaluation(&mut self, &Fresh { pair: index, key, .. }: &Fresh, evaluation: Option<Evaluation>) {
        let Some(evaluation) = evaluation else {
            self.indexed[index as usize] = false;
            return;
        };
        let pair = &mut self.pairs[index as usize];
        pair.evaluated = true;
        if pair.evaluation == NONE {
            pair.evaluation = self.evaluations.len() as u32;
            self.evaluations.push(evaluation);
        }
        self.evaluations[pair.evaluation as usize] = evaluation;
        self.rank(index, key, evaluation);
    }

    /// The best of the evaluated pairs.
    fn best_ranked(&self, alpha: f64) -> Option<Best> {
        let most_frequent = self.ranked.iter().filter_map(|band| band.last_key_value());
        let max_frequency = *most_frequent.map(|(frequency, _)| frequency).max()?;
        let mut best: Option<(f64, Reverse<u64>, u32)> = None;
        for (band, levels) in self.ranked.iter().enumerate().rev() {
            let most_consistent = (band + 1) as f64 / BANDS as f64;
            for (&frequency, level) in levels.iter().rev() {
                let bound = priority(frequency, max_frequency, alpha, most_consistent);
                if best.is_some_and(|(reached, ..)| bound < reached) {
                    break;
                }
                let mut next = level.first();
                while let Some(&(consistency, key, pair)) = next {
                    let priority = priority(frequency, max_frequency, alpha, f64::from_bits(consistency.0));
                    if best.is_some_and(|(reached, ..)| priority < reached) {
                        break;
                    }
                    if best.is_none_or(|best| (priority, Reverse(key)) > (best.0, best.1)) {
                        best = Some((priority, Reverse(key), pair));
                    }
                    // Other consistencies may have the same priority; of one consistency, the first has the smallest key.
                    let after = (consistency, u64::MAX, u32::MAX);
                    next = level.range((Bound::Excluded(after), Bound::Unbounded)).next();
                }
            }
        }
        let (priority, Reverse(key), pair) = best?;
        let Pair { count, evaluation, .. } = self.pairs[pair as usize];
        let evaluation = self.evaluations[evaluation as usize];
        Some(Best { pair, key, count: count.all, evaluation, priority, max_frequency })
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
