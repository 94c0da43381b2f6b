//! The bounded queue between handles and the thread. A full queue is an answer, never a wait.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::handle::Request;
use super::stream::EventSender;

/// A request that waits for its turn.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) events: EventSender,
    pub(super) submitted: Instant,
}

/// Why a job was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Full,
    Closed,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    closed: bool,
}

/// First in, first out, at most `capacity` waiting.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity }
    }

    /// Adds a job. Jobs whose reader has gone make room for it.
    pub(super) fn push(&self, job: Job) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.waiting.len() >= self.capacity {
            state.waiting.retain(|job| !job.events.is_abandoned());
        }
        if state.waiting.len() >= self.capacity {
            return Err(Refused::Full);
        }
        state.waiting.push_back(job);
        self.changed.notify_one();
        Ok(())
    }

    /// The next job, waited for; `None` once the queue is closed and empty.
    pub(super) fn pop(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next job if there is one and it `fits`; those behind it wait with it, so that none is passed over forever.
    pub(super) fn pop_if(&self, fits: impl FnOnce(&Job) -> bool) -> Option<Job> {
        self.lock().waiting.pop_front_if(|job| fits(job))
    }

    /// Takes no more jobs; those that wait are still given out.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// How many wait. Jobs whose reader has gone are not among them: they make room when it is needed.
    pub(super) fn len(&self) -> usize {
        self.lock().waiting.iter().filter(|job| !job.events.is_abandoned()).count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and a list of jobs has no half-made state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
