//! The cells of many grids and the regions they form, packed for speed.
//!
//! Grids lie one below the other, with a column of border cells at the right of every row and a row of them above and
//! below every grid. So every cell has four neighbours without a test for edges, a position is one number, and
//! positions of one grid are in raster order.
//!
//! A cell is one word: the token of its region and how far before it the region's anchor lies. So one load says all
//! about a neighbour. The cells of a region are those that can be reached from its anchor.

use std::fmt::Debug;
use std::ops::Range;

use super::occurrences::unpack;
use crate::grid::Offset;
use crate::memory::prefetch;

/// A cell: the token of its region, and how far before it the region's anchor lies.
pub(super) trait Word: Copy + PartialEq + Debug + Send + Sync + 'static {
    /// The largest token.
    const MAX_TOKEN: u32;
    /// No distance is as large.
    const SIZE: u64;
    fn new(token: u32, distance: u32) -> Self;
    fn token(self) -> u32;
    fn distance(self) -> u32;

    /// The sum and the difference as numbers, with wrapping.
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;

    /// Whether there is room for tokens up to `border` and for grids of at most `cells`, borders included.
    fn fits(border: u32, cells: u64) -> bool {
        border <= Self::MAX_TOKEN && cells < Self::SIZE
    }
}

/// The low bits are the token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Short<const TOKEN_BITS: u32>(u32);

impl<const TOKEN_BITS: u32> Word for Short<TOKEN_BITS> {
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

/// For any tokens and grids.
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

/// Grids of one width, one below the other.
#[derive(Debug, Clone, Copy)]
struct Stack {
    start: u32,
    stride: u32,
    /// 2^64 / stride, rounded up.
    inverse: u64,
}

impl Stack {
    fn new(start: u32, stride: u32) -> Self {
        Self { start, stride, inverse: u64::MAX / u64::from(stride) + 1 }
    }

    /// Row and column of a position, by multiplying (Lemire, Kaser, Kurz 2019: exact for numbers of 32 bits).
    fn place(self, position: u32) -> (i32, i32) {
        let p = position - self.start;
        let row = ((u128::from(self.inverse) * u128::from(p)) >> 64) as u32;
        (row as i32, (p - row * self.stride) as i32)
    }
}

/// The cells of some grids and the regions they form.
#[derive(Debug)]
pub(super) struct Canvas<W> {
    cells: Vec<W>,
    stacks: Vec<Stack>,
    /// Tokens below this are of the codebook: their regions are single cells.
    pub base_vocab_size: u32,
    /// Token of border cells, larger than any other.
    pub border: u32,
    /// Whether every cell is a region of its own.
    single: bool,
}

/// A region as seen from one of its cells: its anchor and its token.
pub(super) type Region = (u32, u32);

/// The region that covers a cell.
#[inline]
pub(super) fn region<W: Word>(cells: &[W], position: u32) -> Region {
    region_of(position, cells[position as usize])
}

#[inline]
fn region_of<W: Word>(position: u32, word: W) -> Region {
    (position.wrapping_sub(word.distance()), word.token())
}

/// Whether a region with this token is anchored here.
#[inline]
pub(super) fn is<W: Word>(cells: &[W], position: u32, token: u32) -> bool {
    cells[position as usize] == W::new(token, 0)
}

/// What is around a cell and the one so far after it, which is right of it or below it: above the first, left of it, and
/// below it or right of it; then above the second or left of it, right of it, and below it.
#[inline]
pub(super) fn around(x: u32, distance: u32, stride: u32) -> [u32; 6] {
    let (y, across) = (x + distance, 1 + stride - distance);
    [x - stride, x - 1, x + across, y - across, y + 1, y + stride]
}

impl<W: Word> Canvas<W> {
    /// No grids, for tokens below `border`, those of the codebook being below `base_vocab_size`.
    pub fn new(base_vocab_size: u32, border: u32) -> Self {
        Self { cells: Vec::new(), stacks: Vec::new(), base_vocab_size, border, single: true }
    }

    /// Number of cells that a grid takes, its borders included.
    pub fn footprint(height: u32, width: u32) -> u64 {
        (u64::from(height) + 2) * (u64::from(width) + 1)
    }

    /// Makes room for exactly this many cells.
    pub fn reserve(&mut self, cells: usize) {
        self.cells.reserve_exact(cells);
    }

    /// Puts a grid that is all border below the others and returns the position of its first cell.
    pub fn push(&mut self, height: u32, width: u32) -> u32 {
        let stride = width + 1;
        let border = W::new(self.border, 0);
        let mut end = self.cells.len();
        if self.stacks.last().is_none_or(|stack| stack.stride != stride) {
            self.stacks.push(Stack::new(end as u32, stride));
            end += stride as usize;
        }
        self.cells.resize(end + (height as usize + 1) * stride as usize, border);
        end as u32
    }

    /// Makes cells regions of their own: a row of a grid, from this position on.
    pub fn set_row(&mut self, position: u32, ids: &[u32]) {
        let start = position as usize;
        for (cell, &id) in self.cells[start..start + ids.len()].iter_mut().zip(ids) {
            *cell = W::new(id, 0);
        }
    }

    /// Whether every cell is a region of its own.
    pub fn is_single(&self) -> bool {
        self.single
    }

    /// Visits all cells, as (position, token, token right of it, token below it), and some of the border.
    #[inline]
    pub fn for_each_cell(&self, mut visit: impl FnMut(u32, u32, u32, u32)) {
        for (i, &Stack { start, stride, .. }) in self.stacks.iter().enumerate() {
            let end = self.stacks.get(i + 1).map_or(self.cells.len(), |next| next.start as usize);
            let cells = &self.cells[start as usize..end];
            // The last row is border.
            let len = cells.len() - stride as usize;
            let (here, right, below) = (&cells[..len], &cells[1..=len], &cells[stride as usize..]);
            for i in 0..len {
                visit(start + i as u32, here[i].token(), right[i].token(), below[i].token());
            }
        }
    }

    /// Number of cells, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Width of a row, border included.
    pub fn stride(&self, position: u32) -> u32 {
        self.stack(position).stride
    }

    /// Width of a row, border included, and where rows of that width begin.
    fn stack(&self, position: u32) -> Stack {
        match self.stacks.as_slice() {
            [stack] => *stack,
            stacks => stacks[stacks.partition_point(|stack| stack.start <= position) - 1],
        }
    }

    /// The cells, some of which are going to be merged, and the token of border cells.
    pub fn cells_to_merge(&mut self) -> (&mut [W], u32) {
        self.single = false;
        (&mut self.cells, self.border)
    }

    /// How many of the first places of a list in raster order are in rows of one width, and that width, border included;
    /// `position` is that of a place.
    pub fn first_of_stride<T>(&self, list: &[T], position: impl Fn(&T) -> u32) -> Option<(u32, usize)> {
        let first = position(list.first()?);
        let number = self.stacks.partition_point(|stack| stack.start <= first) - 1;
        let len = match self.stacks.get(number + 1) {
            Some(next) => list.partition_point(|place| position(place) < next.start),
            None => list.len(),
        };
        Some((self.stacks[number].stride, len))
    }

    /// Those positions where a single cell of one token is left of or above a cell of another.
    pub fn side_by_side<'a>(
        &self,
        positions: &[u32],
        (a, b): (u32, u32),
        stride: u32,
        found: &'a mut [u32],
    ) -> &'a [u32] {
        let cells = self.cells.as_slice();
        let mut len = 0;
        for &p in positions {
            found[len] = p;
            len += usize::from(is(cells, p, a) & (is(cells, p + 1, b) | is(cells, p + stride, b)));
        }
        &found[..len]
    }

    /// Moves those pairs of regions to the front that still have these tokens, and returns how many they are.
    pub fn retain(&self, pairs: &mut [u64], a: u32, b: u32) -> usize {
        let cells = self.cells.as_slice();
        let mut kept = 0;
        for i in 0..pairs.len() {
            let (x, y) = unpack(pairs[i]);
            pairs[kept] = pairs[i];
            kept += usize::from(is(cells, x, a) & is(cells, y, b));
        }
        kept
    }

    /// Begins to fetch the lines of memory of pairs of regions' anchors.
    pub fn fetch_anchors(&self, pairs: &[u64]) {
        for &pair in pairs {
            let (x, y) = unpack(pair);
            prefetch(&self.cells, x as usize);
            prefetch(&self.cells, y as usize);
        }
    }

    /// Begins to fetch the lines of memory around pairs of regions.
    pub fn fetch(&self, pairs: &[u64], stride: u32) {
        for &pair in pairs {
            let (x, y) = unpack(pair);
            for q in [x - stride, x + stride, y - stride, y + stride] {
                prefetch(&self.cells, q as usize);
            }
        }
    }

    /// The same for single cells and what is right of them or below them.
    pub fn fetch_cells(&self, positions: &[u32], stride: u32) {
        for &p in positions {
            for q in [p - stride, p, p + stride, p + 2 * stride] {
                prefetch(&self.cells, q as usize);
            }
        }
    }

    /// Visits the pairs of adjacent regions, as (anchor, anchor, token, token), in raster order of the first anchor, for
    /// those in rows that begin between two positions. Cells are changed meanwhile, and changed back.
    pub fn for_each_pair(&mut self, from: usize, to: usize, visit: &mut impl FnMut(u32, u32, u32, u32)) {
        let mut found = Neighbours::default();
        let Self { cells, stacks, base_vocab_size, border, .. } = self;
        for (start, stride) in rows(stacks, from..to, cells.len()) {
            // The last column is border.
            for x in start..start + stride - 1 {
                let (anchor, a) = region(cells, x);
                if anchor != x || a == *border {
                    continue;
                }
                if a < *base_vocab_size {
                    // Whatever lies left of or above a single cell comes before it.
                    let (right, b) = region(cells, x + 1);
                    let (below, c) = region(cells, x + stride);
                    if b != *border && right > x {
                        visit(x, right, a, b);
                    }
                    if c != *border && below > x && below != right {
                        visit(x, below, a, c);
                    }
                } else {
                    found.find(cells, x, stride, *border);
                    found.for_each(|Neighbour { region: (y, b), .. }| {
                        if y > x && b != *border {
                            visit(x, y, a, b);
                        }
                    });
                }
            }
        }
    }

    /// Visits the pairs of adjacent cells in rows that begin between two positions, as (token, token, whether they are of
    /// two regions): the tokens of a pair of regions once for each side that they share, the one with the first anchor
    /// first.
    pub fn for_each_side(&self, from: usize, to: usize, visit: &mut impl FnMut(u32, u32, bool)) {
        let Self { cells, stacks, border, .. } = self;
        for (start, stride) in rows(stacks, from..to, cells.len()) {
            // The last column is border.
            for p in start..start + stride - 1 {
                let (x, a) = region(cells, p);
                for q in [p + 1, p + stride] {
                    let (y, b) = region(cells, q);
                    let (first, second) = if x < y { (a, b) } else { (b, a) };
                    visit(first, second, (x != y) & (a.max(b) < *border));
                }
            }
        }
    }

    /// Makes `p` a cell of the region at `anchor`.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        self.single = false;
        self.cells[p as usize] = W::new(token, p - anchor);
    }

    /// Where `y` lies as seen from `x`; two positions of one grid.
    pub fn offset(&self, x: u32, y: u32) -> Offset {
        let stack = self.stack(x);
        let ((row, column), (other_row, other_column)) = (stack.place(x), stack.place(y));
        Offset { dy: other_row - row, dx: other_column - column }
    }
}

/// The rows that begin in a range of positions, as (start, stride), but for the last of each stack, which is border.
fn rows(stacks: &[Stack], range: Range<usize>, len: usize) -> impl Iterator<Item = (u32, u32)> {
    stacks.iter().enumerate().flat_map(move |(i, &Stack { start, stride, .. })| {
        let end = stacks.get(i + 1).map_or(len, |next| next.start as usize);
        let first =
            start as usize + range.start.saturating_sub(start as usize).next_multiple_of(stride as usize);
        let rows = (first..range.end.min(end - stride as usize)).step_by(stride as usize);
        rows.map(move |start| (start as u32, stride))
    })
}

/// Most regions that are told apart without sorting.
const FEW: usize = 64;

/// Anchors that differ in their remainder by this are told apart at once.
const SEEN: usize = 1 << 10;

/// Goes around regions, and finds what lies beside them.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// The cells of the regions gone around, in the order in which they were reached, and more places.
    members: Vec<u32>,
    num_members: usize,
    /// By the remainder of its anchor, where a region is among those found; 0 if it is not.
    seen: [u8; SEEN],
    /// Place 0 is for none at all, then come x and y. There are as many places as a byte can tell apart, and `FEW` of them
    /// are used.
    regions: [Region; 256],
    /// The places of those found.
    places: Range<usize>,
    /// One bit per place, of those beside x and of those beside y.
    sides: [u64; 2],
    /// All of them instead, if they are too many, or two anchors have the same remainder.
    many: Vec<Neighbour>,
}

/// A region, or border, beside one or both of two regions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Neighbour {
    pub region: Region,
    pub of_x: bool,
    pub of_y: bool,
}

/// Of none at all.
const NOWHERE: Region = (u32::MAX, 0);

impl Default for Neighbours {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            num_members: 0,
            seen: [0; SEEN],
            regions: [NOWHERE; 256],
            places: 0..0,
            sides: [0; 2],
            many: Vec::new(),
        }
    }
}

/// Regions while they are found.
struct Found<'a> {
    seen: &'a mut [u8; SEEN],
    regions: &'a mut [Region; 256],
    /// The number of places taken.
    len: usize,
    /// One bit per place, of those beside the region gone around.
    beside: u64,
}

impl Found<'_> {
    /// Adds a region, if it is not there yet.
    #[inline]
    fn add(&mut self, region: Region) {
        let seen = &mut self.seen[region.0 as usize % SEEN];
        let there = self.regions[usize::from(*seen)].0 == region.0;
        let place = if there { *seen } else { self.len as u8 };
        *seen = place;
        self.regions[usize::from(self.len as u8)] = region;
        self.beside |= 1_u64.wrapping_shl(place.into());
        self.len += usize::from(!there);
    }
}

impl Neighbours {
    /// Joins two regions, given by their anchors, `x < y`, to one of a new token, anchored at `x`, and finds the regions,
    /// or border, beside them. Returns how many they are. `two_cells` says which have two cells.
    #[inline]
    pub fn merge<W: Word>(
        &mut self,
        cells: &mut [W],
        (x, y): (u32, u32),
        two_cells: [bool; 2],
        stride: u32,
        token: u32,
    ) -> usize {
        self.num_members = 0;
        (self.regions[1].0, self.regions[2].0) = (x, y);
        self.seen[y as usize % SEEN] = 2;
        self.seen[x as usize % SEEN] = 1;
        let walk = |two_cells: bool| if two_cells { Self::walk_two::<W> } else { Self::walk::<W> };
        let (of_x, end) = walk(two_cells[0])(self, cells, x, stride, (x, token), 3);
        let of_first = self.num_members;
        let (of_y, end) = walk(two_cells[1])(self, cells, y, stride, (x, token), end);
        self.sides = [of_x, of_y];
        self.finish(cells, x, stride, 3..end, of_first)
    }

    /// Finds the regions, or border, beside one region, with `border` the token of no region. Returns how many they are.
    pub fn find<W: Word>(&mut self, cells: &mut [W], x: u32, stride: u32, border: u32) -> usize {
        let token = cells[x as usize].token();
        self.num_members = 0;
        self.regions[1].0 = x;
        self.seen[x as usize % SEEN] = 1;
        let (of_x, end) = self.walk(cells, x, stride, (x, border), 2);
        self.sides = [of_x, 0];
        let found = self.finish(cells, x, stride, 2..end, self.num_members);
        for &p in &self.members[..self.num_members] {
            cells[p as usize] = W::new(token, p - x);
        }
        found
    }

    /// Visits those found.
    #[inline]
    pub fn for_each(&self, mut visit: impl FnMut(Neighbour)) {
        let mut sides = self.sides.map(|side| side.wrapping_shr(self.places.start as u32));
        for &region in &self.regions[self.places.clone()] {
            let [of_x, of_y] = sides.map(|side| side & 1 != 0);
            sides = sides.map(|side| side >> 1);
            visit(Neighbour { region, of_x, of_y });
        }
        self.many.iter().copied().for_each(visit);
    }

    /// Goes around the region that is anchored at `start`, makes it part of another region, and adds those regions that
    /// are not there yet. Returns one bit per place, of those beside it, and the number of places taken.
    ///
    /// All is written in any case and kept by moving on, since a branch would be guessed wrong all the time.
    fn walk<W: Word>(
        &mut self,
        cells: &mut [W],
        start: u32,
        stride: u32,
        (anchor, token): Region,
        len: usize,
    ) -> (u64, usize) {
        let Self { members, num_members, seen, regions, .. } = self;
        let old = cells[start as usize];
        let change = W::new(token, start - anchor).minus(old);
        cells[start as usize] = old.plus(change);
        let old = old.token();
        let none = W::new(0, 0);
        let mut found = Found { seen, regions, len, beside: 0 };
        let (mut number, mut end) = (*num_members, *num_members + 1);
        members.resize(members.len().max(end), 0);
        members[number] = start;
        while number < end {
            if members.len() < end + 4 {
                members.resize(2 * (end + 4), 0);
            }
            let p = members[number];
            number += 1;
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let word = cells[q as usize];
                // Cells that were reached already have the new token.
                let inside = word == W::new(old, q.wrapping_sub(start));
                cells[q as usize] = word.plus(if inside { change } else { none });
                members[end] = q;
                end += usize::from(inside);
                found.add(region_of(q, word));
            }
        }
        *num_members = end;
        (found.beside, found.len)
    }

    /// The same for a region of two cells, which most are.
    fn walk_two<W: Word>(
        &mut self,
        cells: &mut [W],
        start: u32,
        stride: u32,
        (anchor, token): Region,
        len: usize,
    ) -> (u64, usize) {
        let Self { members, num_members, seen, regions, .. } = self;
        let to_right = cells[start as usize + 1] == W::new(cells[start as usize].token(), 1);
        let distance = if to_right { 1 } else { stride };
        for p in [start, start + distance] {
            cells[p as usize] = W::new(token, p - anchor);
        }
        let mut found = Found { seen, regions, len, beside: 0 };
        for q in around(start, distance, stride) {
            found.add(region(cells, q));
        }
        members.resize(members.len().max(*num_members + 2), 0);
        members[*num_members..][..2].copy_from_slice(&[start, start + distance]);
        *num_members += 2;
        (found.beside, found.len)
    }

    /// Clears the table, and lists those found by other means if it was too small. The first members are of x.
    fn finish<W: Word>(
        &mut self,
        cells: &[W],
        x: u32,
        stride: u32,
        places: Range<usize>,
        of_first: usize,
    ) -> usize {
        let Self { members, num_members, seen, regions, many, .. } = self;
        // If two are in each other's way, the place of one was given to the other.
        let mut fits = places.end <= FEW;
        for place in 1..places.end.min(FEW) {
            let seen = &mut seen[regions[place].0 as usize % SEEN];
            fits &= usize::from(std::mem::take(seen)) == place;
        }
        many.clear();
        if !fits {
            *seen = [0; SEEN];
            regions[0] = NOWHERE;
            find_many(cells, x, stride, &members[..*num_members], of_first, many);
        }
        self.places = if fits { places } else { 0..0 };
        self.places.len() + self.many.len()
    }
}

/// Lists the regions, or border, beside the region that is anchored at `x`, however many there are. The first of its
/// cells are those of x, the others those of y.
#[cold]
fn find_many<W: Word>(
    cells: &[W],
    x: u32,
    stride: u32,
    members: &[u32],
    of_first: usize,
    found: &mut Vec<Neighbour>,
) {
    for (number, &p) in members.iter().enumerate() {
        for q in [p - stride, p - 1, p + 1, p + stride] {
            let region = region(cells, q);
            if region.0 != x {
                found.push(Neighbour { region, of_x: number < of_first, of_y: number >= of_first });
            }
        }
    }
    found.sort_unstable_by_key(|neighbour| neighbour.region.0);
    found.dedup_by(|other, kept| {
        let same = other.region.0 == kept.region.0;
        kept.of_x |= same & other.of_x;
        kept.of_y |= same & other.of_y;
        same
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// In wide grids many anchors have the same remainder, in others there are too many neighbours.
        #[test]
        fn neighbours_are_those_of_a_plain_search(
            (height, width) in prop_oneof![Just((3, 700)), Just((40, 40)), (1..9_u32, 1..9_u32)],
            joins in prop::collection::vec((any::<u32>(), any::<u32>()), 1..1500),
        ) {
            let mut canvas = Canvas::<Short<18>>::new(1, 2000);
            let start = canvas.push(height, width);
            let stride = width + 1;
            for row in 0..height {
                canvas.set_row(start + row * stride, &vec![0; width as usize]);
            }
            let (cells, border) = canvas.cells_to_merge();
            let mut neighbours = Neighbours::default();
            for (token, (cell, choice)) in (1..).zip(joins) {
                let p = start + cell % height * stride + cell / height % width;
                let (x, _) = region(cells, p);
                let plain = plain_search(cells, &[x], stride);
                let before = cells.to_vec();
                prop_assert_eq!(neighbours.find(cells, x, stride, border), plain.len());
                prop_assert_eq!(found(&neighbours), plain.clone());
                prop_assert!(cells == before);

                let inside: Vec<_> = plain.iter().filter(|other| other.region.1 != border).collect();
                if inside.is_empty() {
                    break;
                }
                let y = inside[choice as usize % inside.len()].region.0;
                let (x, y) = (x.min(y), x.max(y));
                let plain = plain_search(cells, &[x, y], stride);
                let size = |anchor| (0..cells.len() as u32).filter(|&p| region(cells, p).0 == anchor).count();
                let two_cells = [x, y].map(|anchor| size(anchor) == 2);
                prop_assert_eq!(neighbours.merge(cells, (x, y), two_cells, stride, token), plain.len());
                prop_assert_eq!(found(&neighbours), plain);
                for (q, word) in (0..).zip(before) {
                    let (anchor, old) = region_of(q, word);
                    let merged = old != border && (anchor == x || anchor == y);
                    prop_assert_eq!(region(cells, q), if merged { (x, token) } else { (anchor, old) });
                }
            }
        }
    }

    fn found(neighbours: &Neighbours) -> Vec<Neighbour> {
        let mut found = Vec::new();
        neighbours.for_each(|neighbour| found.push(neighbour));
        found.sort_by_key(|neighbour| neighbour.region.0);
        found
    }

    /// Looks at all cells for what lies beside one region or two.
    fn plain_search<W: Word>(cells: &[W], anchors: &[u32], stride: u32) -> Vec<Neighbour> {
        let mut found = std::collections::BTreeMap::new();
        for p in stride..cells.len() as u32 - stride {
            let Some(side) = anchors.iter().position(|&anchor| region(cells, p).0 == anchor) else {
                continue;
            };
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let region = region(cells, q);
                if !anchors.contains(&region.0) {
                    let neighbour =
                        found.entry(region.0).or_insert(Neighbour { region, of_x: false, of_y: false });
                    neighbour.of_x |= side == 0;
                    neighbour.of_y |= side == 1;
                }
            }
        }
        found.into_values().collect()
    }
}
