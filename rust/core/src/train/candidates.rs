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
    /// The level where the pair stands: its frequency, or an upper bound until it is evaluated; 0 if it was dropped.
    level: u64,
    evaluation: Option<Evaluation>,
}

/// Pairs of one frequency.
#[derive(Debug, Default)]
struct Level {
    /// Pairs not evaluated since they came here, and some that have left.
    fresh: Vec<u32>,
    /// Evaluated pairs: by falling consistency (as bits, which have the same order), then by key.
    ranked: BTreeSet<(Reverse<u64>, u64, u32)>,
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
    levels: BTreeMap<u64, Level>,
}

impl Candidates {
    /// Takes up a pair and returns its index.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let pair = self.pairs.len() as u32;
        self.pairs.push(Pair { key, count, level: count, evaluation: None });
        self.levels.entry(count).or_default().fresh.push(pair);
        pair
    }

    /// Whether a pair has not been dropped.
    pub fn is_indexed(&self, pair: u32) -> bool {
        self.pairs[pair as usize].level > 0
    }

    /// A pair's tokens.
    pub fn key(&self, pair: u32) -> u64 {
        self.pairs[pair as usize].key
    }

    /// Lowers a pair's count. Drops the pair and returns false if its frequency is below the threshold.
    pub fn remove(&mut self, pair: u32, removed: u64, threshold: u64) -> bool {
        let Pair { key, count, level, evaluation } = &mut self.pairs[pair as usize];
        *count -= removed;
        let was = *level;
        *level = if *count < threshold { 0 } else { was.min(*count) };
        let stays = evaluation.is_none() && *level == was;
        if let Some(evaluation) = evaluation.take()
            && let Some(level) = self.levels.get_mut(&was)
        {
            level.ranked.remove(&(Reverse(evaluation.consistency.to_bits()), *key, pair));
        }
        if *level > 0 && !stays {
            self.levels.entry(*level).or_default().fresh.push(pair);
        }
        *level > 0
    }

    /// The pair with the highest priority; `evaluate` gets (pair, key, count) and says `None` to drop the pair.
    ///
    /// Goes down the levels until even full consistency would not suffice. All of this is exact in floating point,
    /// because rounding keeps the order of what it rounds.
    pub fn best(
        &mut self,
        alpha: f64,
        mut evaluate: impl FnMut(u32, u64, u64) -> Result<Option<Evaluation>>,
    ) -> Result<Option<Best>> {
        let mut best: Option<Best> = None;
        let mut above = Bound::Unbounded;
        while let Some((&frequency, level)) = self.levels.range_mut((Bound::Unbounded, above)).next_back() {
            above = Bound::Excluded(frequency);
            if let Some(best) = &best
                && priority(frequency, best.max_frequency, alpha, 1.0) < best.priority
            {
                break;
            }
            for pair in std::mem::take(&mut level.fresh) {
                self.evaluate(pair, frequency, &mut evaluate)?;
            }
            let ranked = &self.levels[&frequency].ranked;
            if ranked.is_empty() {
                self.levels.remove(&frequency);
                continue;
            }
            let max_frequency = best.map_or(frequency, |best| best.max_frequency);
            // The first pair of each consistency is the one with the smallest key.
            let mut start = Bound::Unbounded;
            while let Some(&(bits, key, pair)) = ranked.range((start, Bound::Unbounded)).next() {
                start = Bound::Excluded((bits, u64::MAX, u32::MAX));
                let priority = priority(frequency, max_frequency, alpha, f64::from_bits(bits.0));
                if let Some(best) = &best {
                    match priority.total_cmp(&best.priority) {
                        Ordering::Less => break,
                        Ordering::Equal if key > best.key => continue,
                        _ => (),
                    }
                }
                if let Pair { count, evaluation: Some(evaluation), .. } = self.pairs[pair as usize] {
                    best = Some(Best { pair, key, count, evaluation, priority, max_frequency });
                }
            }
        }
        Ok(best)
    }

    fn evaluate(
        &mut self,
        index: u32,
        level: u64,
        evaluate: &mut impl FnMut(u32, u64, u64) -> Result<Option<Evaluation>>,
    ) -> Result<()> {
        let pair = &mut self.pairs[index as usize];
        if pair.level != level || pair.evaluation.is_some() {
            return Ok(());
        }
        pair.evaluation = evaluate(index, pair.key, pair.count)?;
        pair.level = 0;
        if let Some(evaluation) = &pair.evaluation {
            pair.level = evaluation.frequency;
            let entry = (Reverse(evaluation.consistency.to_bits()), pair.key, index);
            self.levels.entry(pair.level).or_default().ranked.insert(entry);
        }
        Ok(())
    }
}
