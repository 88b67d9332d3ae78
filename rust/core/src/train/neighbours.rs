//! Walks over the cells of regions, and finds the regions beside them.

use std::ops::Range;

use super::word::{Region, Word, positions_around, region_at, region_of};
use crate::error::Result;
use crate::memory;

/// Most regions that the table distinguishes; more are distinguished by sorting.
const MAX_TABLE_REGIONS: usize = 64;

/// The table finds a region by the remainder of its anchor by this.
const SLOTS: usize = 1 << 10;

/// A region, or border, beside one or both of two regions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Neighbour {
    pub region: Region,
    pub beside_x: bool,
    pub beside_y: bool,
}

/// Finds the neighbours of one region x, or of two regions x and y, each once.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// The first `num_members` are the cells of x and y in the order in which they were reached.
    members: Vec<u32>,
    num_members: usize,
    /// By the remainder of a region's anchor, its place in `regions`; 0 if it is not there. All 0 between calls.
    slots: [u8; SLOTS],
    /// Place 0 is for no region, then come x and y, then their neighbours. There are as many places as a byte can tell
    /// apart, and `MAX_TABLE_REGIONS` of them are used.
    regions: [Region; 256],
    /// The places of the neighbours.
    places: Range<usize>,
    /// One bit per place: those beside x, and those beside y.
    beside_bits: [u64; 2],
    /// All neighbours instead, if they are too many for the table, or two anchors have the same remainder.
    overflow: Vec<Neighbour>,
    /// Whether there was memory for all of this.
    memory: Result<()>,
}

/// The region at place 0.
const NO_REGION: Region = (u32::MAX, 0);

impl Default for Neighbours {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            num_members: 0,
            slots: [0; SLOTS],
            regions: [NO_REGION; 256],
            places: 0..0,
            beside_bits: [0; 2],
            overflow: Vec::new(),
            memory: Ok(()),
        }
    }
}

/// The table of regions during a walk.
struct RegionTable<'a> {
    slots: &'a mut [u8; SLOTS],
    regions: &'a mut [Region; 256],
    /// The number of places taken.
    len: usize,
    /// One bit per place: those beside the region of the walk.
    beside_bits: u64,
}

impl RegionTable<'_> {
    /// Adds a region, if it is not there yet. Branchless.
    #[inline]
    fn add(&mut self, region: Region) {
        let slot = &mut self.slots[region.0 as usize % SLOTS];
        let is_there = self.regions[usize::from(*slot)].0 == region.0;
        let place = if is_there { *slot } else { self.len as u8 };
        *slot = place;
        self.regions[usize::from(self.len as u8)] = region;
        self.beside_bits |= 1_u64.wrapping_shl(place.into());
        self.len += usize::from(!is_there);
    }
}

/// What memory is for, in messages.
const NEIGHBOURS: &str = "the cells around a region";

impl Neighbours {
    /// Makes room for regions that have at most this many cells together.
    pub fn reserve(&mut self, cells: usize) -> Result<()> {
        // A walk has room for the four sides of the cell that it visits, and writes one cell too many.
        let len = cells + 8;
        if len <= self.members.len() {
            return Ok(());
        }
        memory::resize(&mut self.members, len, 0, NEIGHBOURS)
    }

    /// Fails if there was no memory for the neighbours of a region.
    pub fn check(&self) -> Result<()> {
        self.memory.clone()
    }

    /// Joins two regions, given by their anchors, `x < y`, to one of a new token, anchored at `x`, and finds the
    /// regions, or border, beside them. Returns how many they are. `has_two_cells` says which of x and y have two
    /// cells.
    #[inline]
    pub fn merge<W: Word>(
        &mut self,
        cells: &mut [W],
        (x, y): (u32, u32),
        has_two_cells: [bool; 2],
        stride: u32,
        token: u32,
    ) -> usize {
        self.num_members = 0;
        // x and y are in the table from the start, at places 1 and 2, so that they are not taken for neighbours.
        (self.regions[1].0, self.regions[2].0) = (x, y);
        self.slots[y as usize % SLOTS] = 2;
        self.slots[x as usize % SLOTS] = 1;
        let walk = |two_cells: bool| if two_cells { Self::walk_two_cells::<W> } else { Self::walk::<W> };
        let (beside_x, end) = walk(has_two_cells[0])(self, cells, x, stride, (x, token), 3);
        let members_of_x = self.num_members;
        let (beside_y, end) = walk(has_two_cells[1])(self, cells, y, stride, (x, token), end);
        self.beside_bits = [beside_x, beside_y];
        self.finish(cells, x, stride, 3..end, members_of_x)
    }

    /// Finds the regions, or border, beside one region, with `border` the token of no region. Returns how many they
    /// are.
    pub fn find<W: Word>(&mut self, cells: &mut [W], x: u32, stride: u32, border: u32) -> usize {
        let token = cells[x as usize].token();
        self.num_members = 0;
        self.regions[1].0 = x;
        self.slots[x as usize % SLOTS] = 1;
        let (beside_x, end) = self.walk(cells, x, stride, (x, border), 2);
        self.beside_bits = [beside_x, 0];
        let number = self.finish(cells, x, stride, 2..end, self.num_members);
        // The walk has given the cells another token.
        for &p in &self.members[..self.num_members] {
            cells[p as usize] = W::new(token, p - x);
        }
        number
    }

    /// Visits the neighbours.
    #[inline]
    pub fn for_each(&self, mut visit: impl FnMut(Neighbour)) {
        let mut beside_bits = self.beside_bits.map(|bits| bits.wrapping_shr(self.places.start as u32));
        for &region in &self.regions[self.places.clone()] {
            let [beside_x, beside_y] = beside_bits.map(|bits| bits & 1 != 0);
            beside_bits = beside_bits.map(|bits| bits >> 1);
            visit(Neighbour { region, beside_x, beside_y });
        }
        self.overflow.iter().copied().for_each(visit);
    }

    /// Walks over the region that is anchored at `start`, makes it part of another region, and adds the regions beside
    /// it to the table. Returns one bit per place of those beside it, and the number of places taken. Branchless.
    fn walk<W: Word>(
        &mut self,
        cells: &mut [W],
        start: u32,
        stride: u32,
        (anchor, token): Region,
        len: usize,
    ) -> (u64, usize) {
        let Self { members, num_members, slots, regions, .. } = self;
        // Adding `change` to a member's word gives it the new token and anchor.
        let old_word = cells[start as usize];
        let change = W::new(token, start - anchor).minus(old_word);
        cells[start as usize] = old_word.plus(change);
        let old_token = old_word.token();
        let no_change = W::new(0, 0);
        let mut table = RegionTable { slots, regions, len, beside_bits: 0 };
        // `members` is a queue: cells are appended when they are reached, and visited in that order.
        let (mut number, mut end) = (*num_members, *num_members + 1);
        members.resize(members.len().max(end), 0);
        members[number] = start;
        while number < end {
            // Only if no room was made.
            if members.len() < end + 4 {
                members.resize(2 * (end + 4), 0);
            }
            let p = members[number];
            number += 1;
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let word = cells[q as usize];
                // Cells that were reached already have the new token.
                let is_member = word == W::new(old_token, q.wrapping_sub(start));
                cells[q as usize] = word.plus(if is_member { change } else { no_change });
                members[end] = q;
                end += usize::from(is_member);
                table.add(region_of(q, word));
            }
        }
        *num_members = end;
        (table.beside_bits, table.len)
    }

    /// Does the same as [`Neighbours::walk`] for a region of two cells, which most are.
    fn walk_two_cells<W: Word>(
        &mut self,
        cells: &mut [W],
        start: u32,
        stride: u32,
        (anchor, token): Region,
        len: usize,
    ) -> (u64, usize) {
        let Self { members, num_members, slots, regions, .. } = self;
        // The second cell is right of the first or below it.
        let to_right = cells[start as usize + 1] == W::new(cells[start as usize].token(), 1);
        let distance = if to_right { 1 } else { stride };
        for p in [start, start + distance] {
            cells[p as usize] = W::new(token, p - anchor);
        }
        let mut table = RegionTable { slots, regions, len, beside_bits: 0 };
        for q in positions_around(start, distance, stride) {
            table.add(region_at(cells, q));
        }
        members.resize(members.len().max(*num_members + 2), 0);
        members[*num_members..][..2].copy_from_slice(&[start, start + distance]);
        *num_members += 2;
        (table.beside_bits, table.len)
    }

    /// Clears the table, and finds the neighbours by sorting if it was too small. The first `members_of_x` members are
    /// the cells of x. Returns the number of neighbours.
    fn finish<W: Word>(
        &mut self,
        cells: &[W],
        x: u32,
        stride: u32,
        places: Range<usize>,
        members_of_x: usize,
    ) -> usize {
        let Self { members, num_members, slots, regions, overflow, memory, .. } = self;
        // If two regions share a slot, it holds the place of one of them, and the check fails for the other.
        let mut fits = places.end <= MAX_TABLE_REGIONS;
        for place in 1..places.end.min(MAX_TABLE_REGIONS) {
            let slot = &mut slots[regions[place].0 as usize % SLOTS];
            fits &= usize::from(std::mem::take(slot)) == place;
        }
        overflow.clear();
        if !fits {
            *slots = [0; SLOTS];
            regions[0] = NO_REGION;
            let members = &members[..*num_members];
            if let Err(error) = memory::reserve(overflow, 4 * members.len(), NEIGHBOURS) {
                *memory = Err(error);
            } else {
                find_by_sorting(cells, x, stride, members, members_of_x, overflow);
            }
        }
        self.places = if fits { places } else { 0..0 };
        self.places.len() + self.overflow.len()
    }
}

/// Lists the regions, or border, beside the region that is anchored at `x`, however many there are. The first
/// `members_of_x` of its cells were those of x, the others those of y.
#[cold]
fn find_by_sorting<W: Word>(
    cells: &[W],
    x: u32,
    stride: u32,
    members: &[u32],
    members_of_x: usize,
    neighbours: &mut Vec<Neighbour>,
) {
    for (number, &p) in members.iter().enumerate() {
        for q in [p - stride, p - 1, p + 1, p + stride] {
            let region = region_at(cells, q);
            if region.0 != x {
                let beside_x = number < members_of_x;
                neighbours.push(Neighbour { region, beside_x, beside_y: !beside_x });
            }
        }
    }
    // One of each region, beside x if any of its sides is, and so for y.
    neighbours.sort_unstable_by_key(|neighbour| neighbour.region.0);
    neighbours.dedup_by(|next, previous| {
        let is_same = next.region.0 == previous.region.0;
        previous.beside_x |= is_same & next.beside_x;
        previous.beside_y |= is_same & next.beside_y;
        is_same
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::word::Word32;
    use super::*;

    const BORDER: u32 = 2000;

    /// One grid of single cells of token 0, with border around it.
    fn blank_cells(height: u32, width: u32) -> Vec<Word32<18>> {
        let stride = width + 1;
        let token = |p: u32| {
            let (row, column) = (p / stride, p % stride);
            if (1..=height).contains(&row) && column < width { 0 } else { BORDER }
        };
        (0..(height + 2) * stride).map(|p| Word::new(token(p), 0)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// In wide grids many anchors have the same remainder, in others there are too many neighbours.
        #[test]
        fn neighbours_are_those_of_a_plain_search(
            (height, width) in prop_oneof![Just((3, 700)), Just((40, 40)), (1..9_u32, 1..9_u32)],
            joins in prop::collection::vec((any::<u32>(), any::<u32>()), 1..1500),
        ) {
            let mut cells = blank_cells(height, width);
            let stride = width + 1;
            let mut neighbours = Neighbours::default();
            for (token, (cell, choice)) in (1..).zip(joins) {
                // Around one region.
                let p = stride + cell % height * stride + cell / height % width;
                let (x, _) = region_at(&cells, p);
                let expected = plain_search(&cells, &[x], stride);
                let old_cells = cells.clone();
                prop_assert_eq!(neighbours.find(&mut cells, x, stride, BORDER), expected.len());
                prop_assert_eq!(neighbour_list(&neighbours), expected.clone());
                prop_assert!(cells == old_cells);

                // Around two regions that become one.
                let inner_neighbours: Vec<_> = expected.iter().filter(|other| other.region.1 != BORDER).collect();
                if inner_neighbours.is_empty() {
                    break;
                }
                let y = inner_neighbours[choice as usize % inner_neighbours.len()].region.0;
                let (x, y) = (x.min(y), x.max(y));
                let expected = plain_search(&cells, &[x, y], stride);
                let size = |anchor| (0..cells.len() as u32).filter(|&p| region_at(&cells, p).0 == anchor).count();
                let has_two_cells = [x, y].map(|anchor| size(anchor) == 2);
                let number = neighbours.merge(&mut cells, (x, y), has_two_cells, stride, token);
                prop_assert_eq!(number, expected.len());
                prop_assert_eq!(neighbour_list(&neighbours), expected);
                for (q, word) in (0..).zip(old_cells) {
                    let (anchor, old_token) = region_of(q, word);
                    let is_merged = old_token != BORDER && (anchor == x || anchor == y);
                    prop_assert_eq!(region_at(&cells, q), if is_merged { (x, token) } else { (anchor, old_token) });
                }
            }
        }
    }

    fn neighbour_list(neighbours: &Neighbours) -> Vec<Neighbour> {
        let mut list = Vec::new();
        neighbours.for_each(|neighbour| list.push(neighbour));
        list.sort_by_key(|neighbour| neighbour.region.0);
        list
    }

    /// Looks at all cells for what lies beside one region or two.
    fn plain_search<W: Word>(cells: &[W], anchors: &[u32], stride: u32) -> Vec<Neighbour> {
        let mut neighbours = std::collections::BTreeMap::new();
        for p in stride..cells.len() as u32 - stride {
            let Some(side) = anchors.iter().position(|&anchor| region_at(cells, p).0 == anchor) else {
                continue;
            };
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let region = region_at(cells, q);
                if !anchors.contains(&region.0) {
                    let neighbour = neighbours.entry(region.0).or_insert(Neighbour {
                        region,
                        beside_x: false,
                        beside_y: false,
                    });
                    neighbour.beside_x |= side == 0;
                    neighbour.beside_y |= side == 1;
                }
            }
        }
        neighbours.into_values().collect()
    }
}
