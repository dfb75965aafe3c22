#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_publisher::program::fuzzing::flags(data));
