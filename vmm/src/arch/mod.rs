//! What depends on the processor architecture. A second architecture is a second folder with the same functions.

mod x86_64;

pub use x86_64::*;
