//! Any bytes as options and grids: learn, encode, decode.
#![no_main]

#[allow(dead_code, reason = "each target uses a part of it")]
#[path = "../../rust/core/tests/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::encode_any(bytes));
