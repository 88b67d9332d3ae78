//! How to encode.

/// BPE-dropout: every candidate merge is skipped with some probability (Provilkov et al. 2020).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of skipping a merge, in 0 to 1.
    pub probability: f64,
    /// Same seed, same merges. Grid `i` of a batch uses `seed + i`.
    pub seed: u64,
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EncodeOptions {
    /// Leave out merges at random.
    pub dropout: Option<Dropout>,
    /// Whether to return which token covers which cell.
    pub regions: bool,
}

impl Dropout {
    /// Whether grid `index` skips this candidate merge; depends on nothing but its arguments.
    ///
    /// `x` and `y` are the anchors' cells in raster order, counted from 0.
    pub(crate) fn skips(self, index: u64, merge: u32, x: u32, y: u32) -> bool {
        let seed = split_mix(self.seed.wrapping_add(index));
        let hash = [merge, x, y].into_iter().fold(seed, |hash, part| split_mix(hash ^ u64::from(part)));
        let uniform = (hash >> 11) as f64 / (1_u64 << 53) as f64;
        uniform < self.probability
    }
}

/// One step of the generator `SplitMix64`.
fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
