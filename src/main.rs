//! The `nanite` program.

fn main() {}
