//! Which grid goes to which shard.
//!
//! Shards are worked on at the same time, rule after rule, so for every rule each should have as much to do as any other.
//! What a rule merges comes in clusters: many times in one grid, and in grids that are alike. So a grid goes where its ids
//! are rarest so far, which leaves a third of the difference that chance would.

use std::collections::BTreeMap;
use std::vec::IntoIter;

use crate::grid::Grid;

/// One in so many ids is looked at; odd, so that these are of all columns.
const STEP: usize = 13;

/// A shard and a position there.
type Place = (u32, u32);

/// Deals out grids one by one.
#[derive(Debug)]
pub(super) struct Dealer {
    /// Per height and width of grids, for each shard the positions that are free.
    free: BTreeMap<(u32, u32), Vec<IntoIter<u32>>>,
    /// Per shard, how often each id was seen in its grids.
    seen: Vec<Vec<u32>>,
    /// Per grid that was dealt.
    places: Vec<Option<Place>>,
}

impl Dealer {
    /// For so many ids and grids, and these positions in shards.
    pub fn new(
        ids: u32,
        grids: usize,
        shards: usize,
        positions: impl Iterator<Item = ((u32, u32), Place)>,
    ) -> Self {
        let mut free = BTreeMap::new();
        for (size, (shard, position)) in positions {
            let of_size = free.entry(size).or_insert_with(|| vec![Vec::new(); shards]);
            of_size[shard as usize].push(position);
        }
        let free =
            free.into_iter().map(|(size, shards)| (size, shards.into_iter().map(Vec::into_iter).collect()));
        Self { free: free.collect(), seen: vec![vec![0; ids as usize]; shards], places: vec![None; grids] }
    }

    /// The places of grid `first` and those after it.
    pub fn deal(&mut self, first: usize, grids: &[Grid]) -> Vec<Place> {
        let place = |(index, grid): (usize, &Grid)| {
            let place = self.places[index].unwrap_or_else(|| self.next(grid));
            self.places[index] = Some(place);
            place
        };
        (first..).zip(grids).map(place).collect()
    }

    fn next(&mut self, grid: &Grid) -> Place {
        let free = self.free.get_mut(&(grid.height(), grid.width())).expect("grids of these sizes");
        // One shard needs no choice.
        let ids = if self.seen.len() > 1 { grid.ids() } else { &[] };
        let sample = || ids.iter().step_by(STEP).map(|&id| id as usize);
        let alike = |seen: &[u32]| sample().map(|id| u64::from(seen[id])).sum::<u64>();
        let seen = (0..).zip(&mut self.seen);
        let with_room = seen.zip(free).filter(|(_, free)| free.len() > 0);
        let all = with_room.min_by_key(|((_, seen), _)| alike(seen));
        let ((shard, seen), free) = all.expect("room for every grid");
        sample().for_each(|id| seen[id] += 1);
        (shard, free.next().expect("room for this one"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn dealer(sizes: &[(u32, u32)], shards: usize) -> Dealer {
        let place = |(number, &size)| (size, (number as u32 % shards as u32, number as u32));
        Dealer::new(10, sizes.len(), shards, (0..).zip(sizes).map(place))
    }

    proptest! {
        #[test]
        fn every_grid_has_a_place_of_its_own_and_keeps_it(
            sizes in prop::collection::vec((1..3_u32, 1..3_u32), 1..50),
            shards in 1..4_usize,
            first in any::<prop::sample::Index>(),
        ) {
            let grid = |(index, &(height, width)): (usize, &(u32, u32))| {
                let (height, width) = (height as usize, width as usize);
                Grid::new(index, height, width, vec![index as u32 % 10; height * width]).unwrap()
            };
            let grids: Vec<_> = sizes.iter().enumerate().map(grid).collect();
            let mut dealer = dealer(&sizes, shards);
            let first = first.index(grids.len());
            let last = dealer.deal(first, &grids[first..]);
            let places = dealer.deal(0, &grids);
            prop_assert_eq!(&places[first..], last);
            prop_assert_eq!(places.iter().collect::<HashSet<_>>().len(), grids.len());
            for (size, (shard, position)) in sizes.iter().zip(places) {
                prop_assert_eq!(&sizes[position as usize], size);
                prop_assert_eq!(position as usize % shards, shard as usize);
            }
        }

        #[test]
        fn alike_grids_are_parted(ids in Just((0..40).map(|id| id / 10).collect::<Vec<u32>>()).prop_shuffle()) {
            let grids: Vec<_> = ids.iter().map(|&id| Grid::new(0, 4, 4, vec![id; 16]).unwrap()).collect();
            let places = dealer(&[(4, 4); 40], 2).deal(0, &grids);
            for kind in 0..4 {
                let of_kind = ids.iter().zip(&places).filter(|(id, _)| **id == kind);
                prop_assert_eq!(of_kind.filter(|(_, (shard, _))| *shard == 0).count(), 5);
            }
        }
    }
}
