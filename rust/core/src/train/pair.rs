//! Pairs of tokens, and how often they occur.

use std::ops::{AddAssign, SubAssign};

use crate::statistics::{key, tokens};

/// An indexed pair of tokens, with the sizes of its regions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// Its index among the candidates.
    pub index: u32,
    pub a: u32,
    pub b: u32,
    /// Most cells of a region of `a`, and most of one of `b`.
    pub max_sizes: [u64; 2],
}

impl Pair {
    /// The pair with this index and key, given the most cells of each token's regions.
    pub fn new(index: u32, key: u64, max_sizes: &[u64]) -> Self {
        let (a, b) = tokens(key);
        Self { index, a, b, max_sizes: [a, b].map(|token| max_sizes[token as usize]) }
    }

    /// Most cells that its two regions have together.
    pub fn max_size(self) -> u64 {
        self.max_sizes[0].saturating_add(self.max_sizes[1])
    }
}

/// How often a pair occurs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Count {
    pub total: u64,
    /// How often the second region lies below the first rather than right of it. Only kept up to date for pairs of
    /// single cells, whose histogram this is.
    pub below: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.below += other.below;
    }
}

impl SubAssign for Count {
    fn sub_assign(&mut self, other: Self) {
        self.total -= other.total;
        // For other pairs than those of single cells this number has no meaning and may wrap.
        self.below = self.below.wrapping_sub(other.below);
    }
}

/// A pair of the new token with another token: twice the other token, plus 1 if the other comes first. Below twice the
/// number of tokens.
pub(super) type NewPair = u32;

/// The pair of the new token with `token`, which comes first if it is `before`.
pub(super) fn new_pair(token: u32, before: bool) -> NewPair {
    token * 2 + u32::from(before)
}

/// The key of a pair with the new token.
pub(super) fn new_pair_key(new_token: u32, pair: NewPair) -> u64 {
    let token = pair / 2;
    if pair == new_pair(token, false) { key(new_token, token) } else { key(token, new_token) }
}
