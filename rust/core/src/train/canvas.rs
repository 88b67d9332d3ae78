//! The cells of many grids and the regions they form, packed for speed.
//!
//! Grids lie one below the other, with a column of border cells at the right of every row and a row of them above and
//! below every grid. So every cell has four neighbours without a test for edges, a position is one number, and
//! positions of one grid are in raster order.
//!
//! A cell is one word: the token of its region, how far before it the region's anchor lies, and how far the next cell
//! of the region is, cells of a region forming a ring. So one load says all about a neighbour.

use std::fmt::Debug;
use std::ops::Range;

use super::count::unpack;
use crate::grid::Offset;

/// A cell: the token of its region, how far before it the region's anchor lies, and the step to the region's next cell.
pub(super) trait Word: Copy + Debug + Send + Sync {
    /// The largest token.
    const MAX_TOKEN: u32;
    /// No distance and no step is as large.
    const SIZE: u64;
    fn new(token: u32, distance: u32, step: u32) -> Self;
    fn token(self) -> u32;
    fn distance(self) -> u32;

    /// To be added with wrapping.
    fn step(self) -> u32;

    /// Whether a region with this token is anchored here.
    fn is(self, token: u32) -> bool;

    /// Whether there is room for tokens up to `border` and for grids of at most `cells`, borders included.
    fn fits(border: u32, cells: u64) -> bool {
        border <= Self::MAX_TOKEN && cells < Self::SIZE
    }
}

/// For two million tokens and grids of two million cells: from the low bits on 21 of the token, 22 of the step, 21 of the
/// distance.
impl Word for u64 {
    const MAX_TOKEN: u32 = (1 << 21) - 1;
    const SIZE: u64 = 1 << 21;
    #[inline]
    fn new(token: u32, distance: u32, step: u32) -> Self {
        Self::from(token) | Self::from(step << 10) << 11 | Self::from(distance) << 43
    }
    #[inline]
    fn token(self) -> u32 {
        self as u32 & Self::MAX_TOKEN
    }
    #[inline]
    fn distance(self) -> u32 {
        (self >> 43) as u32
    }
    #[inline]
    fn step(self) -> u32 {
        ((self as i64) << 21 >> 42) as u32
    }
    #[inline]
    fn is(self, token: u32) -> bool {
        self & (u64::MAX << 43 | u64::from(Self::MAX_TOKEN)) == u64::from(token)
    }
}

/// For any tokens and grids.
impl Word for u128 {
    const MAX_TOKEN: u32 = u32::MAX;
    const SIZE: u64 = 1 << 32;
    fn new(token: u32, distance: u32, step: u32) -> Self {
        Self::from(token) | Self::from(step) << 32 | Self::from(distance) << 64
    }
    fn token(self) -> u32 {
        self as u32
    }
    fn distance(self) -> u32 {
        (self >> 64) as u32
    }
    fn step(self) -> u32 {
        (self >> 32) as u32
    }
    fn is(self, token: u32) -> bool {
        self.token() == token && self.distance() == 0
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
    /// Token of border cells, larger than any other.
    border: u32,
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

/// The cell of the same region that comes after this one.
#[inline]
fn next<W: Word>(cells: &[W], position: u32) -> u32 {
    position.wrapping_add(cells[position as usize].step())
}

fn link<W: Word>(cells: &mut [W], from: u32, to: u32) {
    let cell = &mut cells[from as usize];
    *cell = W::new(cell.token(), cell.distance(), to.wrapping_sub(from));
}

/// Whether a region with this token is anchored here.
#[inline]
pub(super) fn is<W: Word>(cells: &[W], position: u32, token: u32) -> bool {
    cells[position as usize].is(token)
}

impl<W: Word> Canvas<W> {
    /// No grids, for tokens below `border`.
    pub fn new(border: u32) -> Self {
        Self { cells: Vec::new(), stacks: Vec::new(), border, single: true }
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
        let border = W::new(self.border, 0, 0);
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
            *cell = W::new(id, 0, 0);
        }
    }

    /// Number of cells, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
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

    /// Splits a list of places in raster order by the width of rows, border included; `position` is that of a place.
    pub fn by_stride<T>(&self, list: &[T], position: impl Fn(&T) -> u32) -> Vec<(u32, Range<usize>)> {
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(first) = list.get(start) {
            let number = self.stacks.partition_point(|stack| stack.start <= position(first));
            let len = match self.stacks.get(number) {
                Some(next) => list[start..].partition_point(|place| position(place) < next.start),
                None => list.len() - start,
            };
            parts.push((self.stacks[number - 1].stride, start..start + len));
            start += len;
        }
        parts
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

    /// Reads the lines of memory around pairs of regions, all at once, so that they are at hand one by one.
    pub fn fetch(&self, pairs: &[u64], stride: u32) {
        let cells = self.cells.as_slice();
        let mut sum = 0;
        for &pair in pairs {
            let (x, y) = unpack(pair);
            for q in [x - stride, x + stride, y - stride, y + stride] {
                sum ^= cells[q as usize].token();
            }
        }
        std::hint::black_box(sum);
    }

    /// The same for single cells and what is right of them or below them.
    pub fn fetch_cells(&self, positions: &[u32], stride: u32) {
        let cells = self.cells.as_slice();
        let mut sum = 0;
        for &p in positions {
            // Below the last row of all, which is border, there is nothing.
            let below = p + 2 * stride - u32::from(p + 2 * stride >= cells.len() as u32) * stride;
            for q in [p - stride, p + stride, below] {
                sum ^= cells[q as usize].token();
            }
        }
        std::hint::black_box(sum);
    }

    /// Counts how often `b` lies right of and below `a`, for single cells, and moves those positions to the front where
    /// it does. Returns (right, below, positions kept).
    pub fn retain_cells(&self, positions: &mut [u32], a: u32, b: u32, stride: u32) -> (u64, u64, usize) {
        let cells = self.cells.as_slice();
        let (mut rights, mut belows, mut kept) = (0, 0, 0);
        for i in 0..positions.len() {
            let x = positions[i];
            let here = is(cells, x, a);
            let (right, below) = (here & is(cells, x + 1, b), here & is(cells, x + stride, b));
            rights += u64::from(right);
            belows += u64::from(below);
            positions[kept] = x;
            kept += usize::from(right | below);
        }
        (rights, belows, kept)
    }

    /// Visits the pairs of adjacent regions, as (anchor, anchor, token, token), in raster order of the first anchor, for
    /// those in rows that begin between two positions.
    pub fn for_each_pair(&self, from: usize, to: usize, visit: &mut impl FnMut(u32, u32, u32, u32)) {
        let mut found = Neighbours::default();
        for (i, &Stack { start, stride, .. }) in self.stacks.iter().enumerate() {
            let end = self.stacks.get(i + 1).map_or(self.cells.len(), |next| next.start as usize);
            let (start, stride) = (start as usize, stride as usize);
            let first = start + from.saturating_sub(start).next_multiple_of(stride);
            // The last row is border.
            for x in (first..to.min(end - stride)).step_by(stride) {
                let (row, below) = self.cells[x..x + 2 * stride].split_at(stride);
                // The last column is border.
                let (row, below) = (&row[..stride - 1], &below[..stride - 1]);
                if row[0].token() == self.border {
                    continue;
                }
                if self.single {
                    self.for_each_pair_of_cells(x as u32, row, below, visit);
                } else {
                    self.for_each_pair_of_regions(x as u32, row, below, &mut found, visit);
                }
            }
        }
    }

    #[inline]
    fn for_each_pair_of_cells(
        &self,
        start: u32,
        row: &[W],
        below: &[W],
        visit: &mut impl FnMut(u32, u32, u32, u32),
    ) {
        let stride = row.len() as u32 + 1;
        let last = row.len() - 1;
        let (rights, below) = (&row[1..], &below[..=last]);
        let token = |word: W| word.token();
        let borders = token(below[0]) == self.border;
        let mut a = token(row[0]);
        for i in 0..last {
            let x = start + i as u32;
            let right = token(rights[i]);
            visit(x, x + 1, a, right);
            if !borders {
                visit(x, x + stride, a, token(below[i]));
            }
            a = right;
        }
        if !borders {
            visit(start + last as u32, start + last as u32 + stride, a, token(below[last]));
        }
    }

    fn for_each_pair_of_regions(
        &self,
        start: u32,
        row: &[W],
        below: &[W],
        found: &mut Neighbours,
        visit: &mut impl FnMut(u32, u32, u32, u32),
    ) {
        let stride = row.len() as u32 + 1;
        for (x, (&word, &below)) in (start..).zip(row.iter().zip(below)) {
            if word.distance() != 0 {
                continue;
            }
            let a = word.token();
            if word.step() == 0 {
                // Whatever lies left of or above a single cell comes before it.
                let (right, b) = region(&self.cells, x + 1);
                let (below, c) = region_of(x + stride, below);
                if b != self.border && right > x {
                    visit(x, right, a, b);
                }
                if c != self.border && below > x && below != right {
                    visit(x, below, a, c);
                }
            } else {
                found.find(&self.cells, x, x, stride);
                found.for_each(|Neighbour { region: (y, b), .. }| {
                    if y > x && b != self.border {
                        visit(x, y, a, b);
                    }
                });
            }
        }
    }

    /// Makes `p` a cell of the region at `anchor`, right after the anchor in the ring.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        self.single = false;
        let after = next(&self.cells, anchor);
        self.cells[p as usize] = W::new(token, p - anchor, after.wrapping_sub(p));
        link(&mut self.cells, anchor, p);
    }

    /// Where `y` lies as seen from `x`; two positions of one grid.
    pub fn offset(&self, x: u32, y: u32) -> Offset {
        let stack = self.stack(x);
        let ((row, column), (other_row, other_column)) = (stack.place(x), stack.place(y));
        Offset { dy: other_row - row, dx: other_column - column }
    }
}

/// Most regions that are told apart without sorting.
const FEW: usize = 64;

/// Anchors that differ in their remainder by this are told apart at once.
const SEEN: usize = 1 << 10;

/// The regions beside two regions, x and y, each once.
#[derive(Debug)]
pub(super) struct Neighbours {
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

impl Default for Neighbours {
    fn default() -> Self {
        let regions = [(u32::MAX, 0); 256];
        Self { seen: [0; SEEN], regions, places: 0..0, sides: [0; 2], many: Vec::new() }
    }
}

impl Neighbours {
    /// Finds the regions, or border, beside two regions, which may be the same. Returns how many they are.
    #[inline]
    pub fn find<W: Word>(&mut self, cells: &[W], x: u32, y: u32, stride: u32) -> usize {
        let first = if x == y { 2 } else { 3 };
        (self.regions[1].0, self.regions[2].0) = (x, y);
        self.seen[y as usize % SEEN] = first as u8 - 1;
        self.seen[x as usize % SEEN] = 1;
        let (of_x, end) = self.walk(cells, x, stride, first);
        let (of_y, end) = if x == y { (0, end) } else { self.walk(cells, y, stride, end) };
        // If two are in each other's way, the place of one was given to the other.
        let mut fits = end <= FEW;
        for place in 1..end {
            fits &= usize::from(self.seen[self.regions[place].0 as usize % SEEN]) == place;
        }
        for place in 1..end {
            self.seen[self.regions[place].0 as usize % SEEN] = 0;
        }
        self.many.clear();
        self.places = first..if fits { end } else { first };
        self.sides = [of_x, of_y];
        if !fits {
            find_many(cells, x, y, stride, &mut self.many);
        }
        self.places.len() + self.many.len()
    }

    /// Visits those found.
    #[inline]
    pub fn for_each(&self, mut visit: impl FnMut(Neighbour)) {
        for place in self.places.clone() {
            let [of_x, of_y] = self.sides.map(|side| side >> place & 1 != 0);
            visit(Neighbour { region: self.regions[place], of_x, of_y });
        }
        self.many.iter().copied().for_each(visit);
    }

    /// Goes around a region and adds those regions that are not there yet. Returns one bit per place, of those beside it,
    /// and the number of places taken; if that is more than `FEW`, it stopped.
    ///
    /// All is written in any case and kept by moving on, since a branch would be guessed wrong all the time.
    fn walk<W: Word>(&mut self, cells: &[W], anchor: u32, stride: u32, mut len: usize) -> (u64, usize) {
        let Self { seen, regions, .. } = self;
        let mut beside = 0_u64;
        let mut p = anchor;
        while len <= FEW {
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let region = region(cells, q);
                let seen = &mut seen[region.0 as usize % SEEN];
                let there = regions[usize::from(*seen)].0 == region.0;
                let place = if there { *seen } else { len as u8 };
                *seen = place;
                regions[usize::from(len as u8)] = region;
                beside |= 1_u64.wrapping_shl(place.into());
                len += usize::from(!there);
            }
            p = next(cells, p);
            if p == anchor {
                break;
            }
        }
        (beside, len)
    }
}

/// Lists the regions, or border, beside two regions, however many there are.
#[cold]
fn find_many<W: Word>(cells: &[W], x: u32, y: u32, stride: u32, found: &mut Vec<Neighbour>) {
    for start in [x, y] {
        let mut p = start;
        loop {
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let region = region(cells, q);
                if region.0 != x && region.0 != y {
                    found.push(Neighbour { region, of_x: start == x, of_y: start != x });
                }
            }
            p = next(cells, p);
            if p == start {
                break;
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

/// Joins region `y` to region `x`, both given by their anchors, `x < y`. The anchor is `x`.
pub(super) fn merge<W: Word>(cells: &mut [W], x: u32, y: u32, token: u32) {
    for start in [x, y] {
        let mut p = start;
        loop {
            let cell = &mut cells[p as usize];
            let step = cell.step();
            *cell = W::new(token, p - x, step);
            p = p.wrapping_add(step);
            if p == start {
                break;
            }
        }
    }
    // Two rings become one when one link of each is exchanged.
    let (after_x, after_y) = (next(cells, x), next(cells, y));
    link(cells, x, after_y);
    link(cells, y, after_x);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// In wide grids many anchors have the same remainder, in others there are too many neighbours.
        #[test]
        fn neighbours_are_those_of_the_plain_search(
            (height, width) in prop_oneof![Just((3, 700)), Just((40, 40)), (1..9_u32, 1..9_u32)],
            joins in prop::collection::vec((any::<u32>(), any::<u32>()), 1..1500),
        ) {
            let mut canvas = Canvas::<u64>::new(9);
            let start = canvas.push(height, width);
            for row in 0..height {
                canvas.set_row(start + row * (width + 1), &vec![1; width as usize]);
            }
            let stride = width + 1;
            let mut neighbours = Neighbours::default();
            for (cell, choice) in joins {
                let p = start + cell % height * stride + cell / height % width;
                let (x, _) = region(&canvas.cells, p);
                let (mut plain, mut found) = (Vec::new(), Vec::new());
                find_many(&canvas.cells, x, x, stride, &mut plain);
                prop_assert_eq!(neighbours.find(&canvas.cells, x, x, stride), plain.len());
                plain.retain(|other| other.region.1 != 9);
                if plain.is_empty() {
                    break;
                }
                let y = plain[choice as usize % plain.len()].region.0;
                let (x, y) = (x.min(y), x.max(y));
                plain.clear();
                find_many(&canvas.cells, x, y, stride, &mut plain);
                prop_assert_eq!(neighbours.find(&canvas.cells, x, y, stride), plain.len());
                neighbours.for_each(|neighbour| found.push(neighbour));
                found.sort_by_key(|neighbour| neighbour.region.0);
                prop_assert_eq!(found, plain);
                merge(canvas.cells_to_merge().0, x, y, 2);
            }
        }
    }
}
