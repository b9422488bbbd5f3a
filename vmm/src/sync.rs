//! Locks that a panic elsewhere cannot turn into a second panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock. A poisoned one is taken all the same: the monitor is built with `panic = "abort"`, so that only
/// tests could ever see the poison.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
