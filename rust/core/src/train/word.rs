//! A cell as one word of memory: the token of its region, and how far before it the region's anchor lies.
//!
//! So one load tells token and anchor of a neighbour. The cells of a region are those that can be reached from its
//! anchor over cells with the same token and anchor.

use std::fmt::Debug;

/// A cell: the token of its region, and how far before it, in positions, the region's anchor lies.
pub(super) trait Word: Copy + PartialEq + Debug + Send + Sync + 'static {
    /// The largest token.
    const MAX_TOKEN: u32;
    /// No distance is as large.
    const SIZE: u64;
    fn new(token: u32, distance: u32) -> Self;
    fn token(self) -> u32;
    fn distance(self) -> u32;

    /// The sum as numbers, with wrapping.
    fn plus(self, other: Self) -> Self;
    /// The difference as numbers, with wrapping.
    fn minus(self, other: Self) -> Self;

    /// Whether there is room for tokens up to `border` and for grids of at most `cells`, borders included.
    fn fits(border: u32, cells: u64) -> bool {
        border <= Self::MAX_TOKEN && cells < Self::SIZE
    }
}

/// A word of 32 bits, of which the low ones are the token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Word32<const TOKEN_BITS: u32>(u32);

impl<const TOKEN_BITS: u32> Word for Word32<TOKEN_BITS> {
    const MAX_TOKEN: u32 = (1 << TOKEN_BITS) - 1;
    const SIZE: u64 = 1 << (u32::BITS - TOKEN_BITS);
    #[inline]
    fn new(token: u32, distance: u32) -> Self {
        Self(token.wrapping_add(distance << TOKEN_BITS))
    }
    #[inline]
    fn token(self) -> u32 {
        self.0 & Self::MAX_TOKEN
    }
    #[inline]
    fn distance(self) -> u32 {
        self.0 >> TOKEN_BITS
    }
    #[inline]
    fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
    #[inline]
    fn minus(self, other: Self) -> Self {
        Self(self.0.wrapping_sub(other.0))
    }
}

/// A word for any tokens and grids.
impl Word for u64 {
    const MAX_TOKEN: u32 = u32::MAX;
    const SIZE: u64 = 1 << 32;
    #[inline]
    fn new(token: u32, distance: u32) -> Self {
        Self::from(token) | Self::from(distance) << 32
    }
    #[inline]
    fn token(self) -> u32 {
        self as u32
    }
    #[inline]
    fn distance(self) -> u32 {
        (self >> 32) as u32
    }
    #[inline]
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
    #[inline]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

/// A region as seen from one of its cells: its anchor and its token.
pub(super) type Region = (u32, u32);

/// The region that covers a cell.
#[inline]
pub(super) fn region_at<W: Word>(cells: &[W], position: u32) -> Region {
    region_of(position, cells[position as usize])
}

/// The region that covers a cell, given the cell's word.
#[inline]
pub(super) fn region_of<W: Word>(position: u32, word: W) -> Region {
    (position.wrapping_sub(word.distance()), word.token())
}

/// Whether a region with this token is anchored here.
#[inline]
pub(super) fn has_anchor<W: Word>(cells: &[W], position: u32, token: u32) -> bool {
    cells[position as usize] == W::new(token, 0)
}

/// The positions around a cell x and the cell y that lies `distance` after it, which is right of it or below it.
///
/// First those around x: above, left, and below or right; then those around y: above or left, right, and below.
#[inline]
pub(super) fn positions_around(x: u32, distance: u32, stride: u32) -> [u32; 6] {
    let (y, across) = (x + distance, 1 + stride - distance);
    [x - stride, x - 1, x + across, y - across, y + 1, y + stride]
}
