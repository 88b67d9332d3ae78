//! The indexed pairs and the choice of the next one.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::error::Result;
use crate::grid::Offset;
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
    count: u64,
    /// The frequency is no higher: it was no higher before, and it never rises.
    bound: u64,
    evaluation: Option<Evaluation>,
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
    /// Per pair, whether it has not been dropped.
    indexed: Vec<bool>,
    /// Pairs without an evaluation, by an upper bound of their frequencies, and some that have one by now.
    fresh: Vec<Vec<u32>>,
    /// No bucket above this one holds anything.
    top: usize,
    /// Per frequency, the evaluated pairs: by falling consistency (as bits, which have the same order), then by key; and
    /// some whose evaluation is out of date.
    ranked: BTreeMap<u64, BTreeSet<(Reverse<u64>, u64, u32)>>,
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
    /// Takes up a pair and returns its index.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let pair = self.pairs.len() as u32;
        self.pairs.push(Pair { key, count, bound: count, evaluation: None });
        self.indexed.push(true);
        self.push_fresh(pair, count);
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

    /// Lowers a pair's count. Drops the pair and returns false if its frequency must be below the threshold.
    pub fn remove(&mut self, pair: u32, removed: u64, threshold: u64) -> bool {
        let Pair { count, bound, evaluation, .. } = &mut self.pairs[pair as usize];
        *count -= removed;
        let before = evaluation.take();
        *bound = before.map_or(*bound, |before| before.frequency).min(*count);
        if *bound < threshold {
            self.indexed[pair as usize] = false;
            return false;
        }
        // Without an evaluation, the pair waits in the bucket of a bound that it had, which is looked at in time.
        if before.is_some() {
            let bound = *bound;
            self.push_fresh(pair, bound);
        }
        true
    }

    /// The pair with the highest priority; `evaluate` gets (pair, key, count) and says `None` to drop the pair.
    ///
    /// Evaluates until none of the others could win even with full consistency. All of this is exact in floating
    /// point, because rounding keeps the order of what it rounds.
    pub fn best(
        &mut self,
        alpha: f64,
        mut evaluate: impl FnMut(u32, u64, u64) -> Result<Option<Evaluation>>,
    ) -> Result<Option<Best>> {
        loop {
            while self.top > 0 && self.fresh[self.top].is_empty() {
                self.top -= 1;
            }
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
            for pair in std::mem::take(&mut self.fresh[self.top]) {
                self.evaluate(pair, &mut evaluate)?;
            }
        }
    }

    fn evaluate(
        &mut self,
        index: u32,
        evaluate: &mut impl FnMut(u32, u64, u64) -> Result<Option<Evaluation>>,
    ) -> Result<()> {
        let Pair { key, count, bound, evaluation } = &mut self.pairs[index as usize];
        if !self.indexed[index as usize] || evaluation.is_some() {
            return Ok(());
        }
        if bucket(*bound) < self.top {
            let bound = *bound;
            self.push_fresh(index, bound);
            return Ok(());
        }
        *evaluation = evaluate(index, *key, *count)?;
        match evaluation {
            None => self.indexed[index as usize] = false,
            Some(Evaluation { frequency, consistency, .. }) => {
                let entry = (Reverse(consistency.to_bits()), *key, index);
                self.ranked.entry(*frequency).or_default().insert(entry);
            }
        }
        Ok(())
    }

    /// The best of the evaluated pairs. On the way, throws out what is out of date.
    fn best_ranked(&mut self, alpha: f64) -> Option<Best> {
        let mut best: Option<Best> = None;
        let mut outdated = Vec::new();
        for (&frequency, ranked) in self.ranked.iter().rev() {
            if let Some(Best { priority: reached, max_frequency, .. }) = best
                && priority(frequency, max_frequency, alpha, 1.0) < reached
            {
                break;
            }
            let max_frequency = best.map_or(frequency, |best| best.max_frequency);
            let mut next = ranked.first();
            while let Some(&entry) = next {
                let (Reverse(consistency), key, pair) = entry;
                let mut after = entry;
                let priority = priority(frequency, max_frequency, alpha, f64::from_bits(consistency));
                let order = best.map_or(Ordering::Greater, |best| priority.total_cmp(&best.priority));
                if order == Ordering::Less {
                    break;
                }
                if order == Ordering::Greater || best.is_some_and(|best| key < best.key) {
                    let Pair { count, evaluation, .. } = self.pairs[pair as usize];
                    match evaluation
                        .filter(|now| now.frequency == frequency && now.consistency.to_bits() == consistency)
                    {
                        None => outdated.push((frequency, entry)),
                        Some(evaluation) => {
                            best = Some(Best { pair, key, count, evaluation, priority, max_frequency });
                            // Of one consistency, the first has the smallest key.
                            after = (Reverse(consistency), u64::MAX, u32::MAX);
                        }
                    }
                } else {
                    after = (Reverse(consistency), u64::MAX, u32::MAX);
                }
                next = ranked.range((Bound::Excluded(after), Bound::Unbounded)).next();
            }
        }
        for (frequency, entry) in outdated {
            if let Some(ranked) = self.ranked.get_mut(&frequency) {
                ranked.remove(&entry);
                if ranked.is_empty() {
                    self.ranked.remove(&frequency);
                }
            }
        }
        best
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
