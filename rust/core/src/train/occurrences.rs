//! Where indexed pairs occur. There are tens of thousands of lists, most of them short, which come and go: with a piece of
//! memory for each, a tenth of the time would go to getting and giving it back, and more with threads that do so at once.
//! So they lie one after the other in a few blocks.

/// Two anchors as one number; numbers are in raster order of the first, then of the second.
#[inline]
pub(super) fn pack(x: u32, y: u32) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

/// The anchors in such a number.
#[inline]
pub(super) fn unpack(anchors: u64) -> (u32, u32) {
    ((anchors >> 32) as u32, anchors as u32)
}

/// Places of pairs.
#[derive(Debug)]
pub(super) enum Places<Cells = Vec<u32>, Regions = Vec<u64>> {
    /// Single cells of the codebook's tokens: the first of the two. The other lies right of it, below it, or both.
    Cells(Cells),
    /// Any regions: the anchors of both, packed.
    Regions(Regions),
}

impl Places {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Cells(places) => places.len(),
            Self::Regions(places) => places.len(),
        }
    }
}

/// Places of some pairs, one pair after the other.
#[derive(Debug)]
pub(super) struct Found {
    /// Keys and numbers of places.
    pub pairs: Vec<(u64, usize)>,
    pub places: Places,
}

/// Lists of places, by the index of their pair.
#[derive(Debug, Default)]
pub(super) struct Lists {
    parts: Vec<Part>,
    cells: Vec<Block<u32>>,
    regions: Block<u64>,
}

/// A part of a block.
#[derive(Debug, Clone, Copy)]
struct Part {
    start: usize,
    len: u32,
    /// The number of its block of cells, or `REGIONS`.
    block: u32,
}

const REGIONS: u32 = u32::MAX;

const NO_PART: Part = Part { start: 0, len: 0, block: REGIONS };

/// So many cells get a block of their own, since copying them would take long.
const OWN_BLOCK: usize = 1 << 12;

/// With fewer places, what is left of dropped lists does not take memory enough to move the others. Tests have fewer.
const FEW_PLACES: usize = if cfg!(test) { 1 << 8 } else { 1 << 21 };

/// Lists, and what is left of others.
#[derive(Debug, Default)]
struct Block<T> {
    places: Vec<T>,
    /// How many places are in lists.
    listed: usize,
}

impl Lists {
    /// None, with memory for those of regions.
    pub fn new(mut memory: Vec<u64>) -> Self {
        memory.clear();
        Self { regions: Block { places: memory, listed: 0 }, ..Self::default() }
    }

    /// Takes the places of those pairs that have an index, which is their place among `keys`.
    pub fn extend(&mut self, keys: &[u64], Found { pairs, places }: Found) {
        self.parts.resize(keys.len().max(self.parts.len()), NO_PART);
        let (block, mut start) = match places {
            Places::Cells(places) => {
                if self.cells.is_empty() || places.len() >= OWN_BLOCK {
                    self.cells.push(Block::default());
                }
                let block = self.cells.len() - 1;
                (block as u32, self.cells[block].append(places))
            }
            Places::Regions(places) => (REGIONS, self.regions.append(places)),
        };
        for (key, len) in pairs {
            if let Ok(pair) = keys.binary_search(&key) {
                self.parts[pair] = Part { start, len: len as u32, block };
                match self.cells.get_mut(block as usize) {
                    Some(cells) => cells.listed += len,
                    None => self.regions.listed += len,
                }
            }
            start += len;
        }
    }

    /// Adds lists of regions of these lengths for `first` and the pairs after it, to be filled: one after the other.
    pub fn add(&mut self, first: u32, lens: &[usize], fill: impl FnOnce(&mut [u64])) {
        self.regions.make_room(lens.iter().sum(), &mut self.parts);
        self.parts.resize(first as usize, NO_PART);
        let first = self.regions.places.len();
        let mut start = first;
        for &len in lens {
            self.parts.push(Part { start, len: len as u32, block: REGIONS });
            start += len;
        }
        self.regions.listed += start - first;
        self.regions.places.resize(start, 0);
        fill(&mut self.regions.places[first..]);
    }

    /// The list of a pair.
    pub fn get(&mut self, pair: u32) -> Places<&mut [u32], &mut [u64]> {
        let Part { start, len, block } = self.parts.get(pair as usize).copied().unwrap_or(NO_PART);
        let range = start..start + len as usize;
        match self.cells.get_mut(block as usize) {
            Some(cells) => Places::Cells(&mut cells.places[range]),
            None => Places::Regions(&mut self.regions.places[range]),
        }
    }

    /// Drops all but the first `len` places of a pair.
    pub fn truncate(&mut self, pair: u32, len: usize) {
        let Some(part) = self.parts.get_mut(pair as usize) else { return };
        let dropped = (part.len as usize).saturating_sub(len);
        part.len -= dropped as u32;
        match self.cells.get_mut(part.block as usize) {
            Some(cells) => cells.listed -= dropped,
            None => self.regions.listed -= dropped,
        }
    }

    /// Whether it is time to [`tidy`](Lists::tidy) up: the block of regions is all but full, or half of one of cells is in no
    /// list.
    pub fn are_untidy(&self) -> bool {
        self.regions.is_full_but_for(64) && self.regions.is_wasteful(&self.parts)
            || self.cells.iter().any(|cells| cells.is_emptier_than(2.0))
    }

    /// Leaves out places that are in no list, where they are many.
    pub fn tidy(&mut self) {
        if self.regions.is_full_but_for(8) && self.regions.is_wasteful(&self.parts) {
            self.regions.compact(&mut self.parts, REGIONS);
        }
        for (number, cells) in (0..).zip(&mut self.cells) {
            if cells.is_emptier_than(1.75) {
                cells.compact(&mut self.parts, number);
                cells.places.shrink_to_fit();
            }
        }
    }
}

impl<T: Copy> Block<T> {
    /// Adds places and returns where they begin.
    fn append(&mut self, places: Vec<T>) -> usize {
        let start = self.places.len();
        if start == 0 {
            self.places = places;
        } else {
            self.places.extend_from_slice(&places);
        }
        start
    }

    /// Makes room for more places of regions: leaves out those that are in no list, if they are many, or else takes more
    /// memory.
    fn make_room(&mut self, more: usize, parts: &mut [Part]) {
        if self.places.len() + more > self.places.capacity() {
            if self.is_wasteful(parts) {
                self.compact(parts, REGIONS);
            }
            if self.places.len() + more > self.places.capacity() {
                self.places.reserve_exact(more + self.many(parts));
            }
        }
    }

    /// So many places make a block large.
    fn many(&self, parts: &[Part]) -> usize {
        self.places.len() / 4 + parts.len()
    }

    /// Whether there is room for less than a part of the places, one of so many.
    fn is_full_but_for(&self, parts: usize) -> bool {
        self.places.len() + self.places.len() / parts > self.places.capacity()
    }

    /// Whether many places are in no list.
    fn is_wasteful(&self, parts: &[Part]) -> bool {
        self.places.len() - self.listed > self.many(parts)
    }

    /// Whether there are so many times as many places as are in lists.
    fn is_emptier_than(&self, times: f64) -> bool {
        self.places.len() > FEW_PLACES && self.places.len() as f64 > times * self.listed as f64
    }

    /// Leaves out places that are in no list, this being the block of that number.
    fn compact(&mut self, parts: &mut [Part], number: u32) {
        let mut parts: Vec<_> = parts.iter_mut().filter(|part| part.block == number).collect();
        parts.sort_unstable_by_key(|part| part.start);
        let mut end = 0;
        for part in parts {
            self.places.copy_within(part.start..part.start + part.len as usize, end);
            part.start = end;
            end += part.len as usize;
        }
        self.places.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However many come and go, every list holds what was put there.
        #[test]
        fn lists_hold_what_plain_ones_do(
            at_first in prop::collection::vec(prop_oneof![0..300_usize, OWN_BLOCK..OWN_BLOCK + 300], 0..20),
            steps in prop::collection::vec((prop::collection::vec(0..200_usize, 1..4), any::<u32>(), 0..100_usize), 0..200),
            memory in 0..1000_usize,
        ) {
            let mut lists = Lists::new(vec![7; memory]);
            let mut plain: Vec<Vec<u64>> = Vec::new();
            // Of every second key there is no index.
            let keys: Vec<u64> = (0..at_first.len() as u64).map(|number| 2 * number).collect();
            for (key, &len) in keys.iter().zip(&at_first) {
                let places: Vec<u32> = (0..2 * len as u32 + 5).collect();
                plain.push(places[5..5 + len].iter().map(|&place| place.into()).collect());
                lists.extend(&keys, Found {
                    pairs: vec![(key + 1, 5), (*key, len), (key + 1, len)],
                    places: Places::Cells(places),
                });
            }
            for (step, (lens, pair, len)) in steps.iter().enumerate() {
                lists.add(plain.len() as u32, lens, |places| {
                    assert_eq!(places.len(), lens.iter().sum::<usize>());
                    places.iter_mut().zip(step as u64 * 1000..).for_each(|(place, value)| *place = value);
                });
                let mut values = step as u64 * 1000..;
                plain.extend(lens.iter().map(|&len| values.by_ref().take(len).collect::<Vec<_>>()));
                let pair = *pair as usize % (plain.len() + 1);
                lists.truncate(pair as u32, *len);
                if let Some(list) = plain.get_mut(pair) {
                    list.truncate(*len);
                }
                if step % 5 == 0 {
                    lists.tidy();
                }
            }
            for (pair, plain) in plain.iter().enumerate() {
                let found: Vec<u64> = match lists.get(pair as u32) {
                    Places::Cells(places) => places.iter().map(|&place| place.into()).collect(),
                    Places::Regions(places) => places.to_vec(),
                };
                prop_assert_eq!(&found, plain);
            }
        }
    }
}
