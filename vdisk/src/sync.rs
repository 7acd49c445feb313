//! Locks, atomics and threads behind one name: the real ones, or (feature `schedule`) those of
//! `shuttle`, which runs a test under many controlled schedules.
//!
//! Invariant: code of the overlay takes its primitives from here only; one it took elsewhere would
//! be invisible to the schedule test.

#[cfg(not(feature = "schedule"))]
pub(crate) use real::*;
#[cfg(feature = "schedule")]
pub(crate) use scheduled::*;

#[cfg(feature = "schedule")]
std::thread_local! {
    static PLANTED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Makes `fill` look at a block, unlock, and store, for tests run by the calling thread: what a schedule
/// test must find, or it proves nothing.
#[cfg(feature = "schedule")]
pub fn plant(planted: bool) {
    PLANTED.set(planted);
}

#[cfg(feature = "schedule")]
pub(crate) fn is_planted() -> bool {
    PLANTED.get()
}

#[cfg(not(feature = "schedule"))]
mod real {
    pub(crate) use std::{
        sync::atomic::{AtomicBool, AtomicU64, Ordering},
        thread::{JoinHandle, spawn},
    };

    pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock};

    /// A condition that threads wait for.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar(parking_lot::Condvar);

    impl Condvar {
        pub(crate) fn wait<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.0.wait(&mut guard);
            guard
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

#[cfg(feature = "schedule")]
mod scheduled {
    pub(crate) use shuttle::{
        sync::{
            MutexGuard, RwLockReadGuard, RwLockWriteGuard,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
        thread::{JoinHandle, spawn},
    };

    /// `shuttle`'s mutex without poisoning.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
        }
    }

    /// `shuttle`'s lock without poisoning.
    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner())
        }

        pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner())
        }
    }

    /// A condition that threads wait for.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar(shuttle::sync::Condvar);

    impl Condvar {
        pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.0.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
