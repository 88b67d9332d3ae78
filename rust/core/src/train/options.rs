//! How to learn a vocabulary.

use crate::vocabulary::{MergeMode, Quantizer};

/// How to learn a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Number of ids in the codebook (K).
    pub base_vocab_size: u32,
    /// Most merges to learn.
    pub num_merges: usize,
    /// What a merge matches.
    pub merge_mode: MergeMode,
    /// Weight of spatial consistency in the priority.
    pub alpha: f64,
    /// Width of the kernel of spatial consistency, in cells.
    pub sigma: f64,
    /// Least frequency of a pair that is merged.
    pub min_frequency: u64,
    /// Number of threads; 0 means one per core, but fewer for few grids. The result does not depend on it.
    pub num_threads: usize,
    /// About how many pairs to index when all pairs are counted, or up to twice as many in oriented mode or with a
    /// large alpha. The result does not depend on it: with fewer, pairs are counted more often; with more, more are
    /// kept up to date.
    pub indexed_pairs: usize,
    /// The quantizer whose ids these are.
    pub quantizer: Quantizer,
}

impl Default for TrainOptions {
    /// The specification's defaults, for a codebook of 8192 ids.
    fn default() -> Self {
        Self {
            base_vocab_size: 8192,
            num_merges: 8192,
            merge_mode: MergeMode::Pair,
            alpha: 0.3,
            sigma: 1.0,
            min_frequency: 2,
            num_threads: 0,
            indexed_pairs: 20_000,
            quantizer: Quantizer::default(),
        }
    }
}
