//! Records that are read ahead: one thread cuts a file, all cores make something of what was cut.
//!
//! What is made is taken in the order of the file and on the thread that reads, and nothing behind an error is taken:
//! who takes it sees no difference to records that are made one by one.

use std::collections::VecDeque;
use std::mem;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Result, anyhow};
use rayon::prelude::*;
use rayon::{Scope, Yield};

use super::{Place, Raw, Sink};

/// Bytes from which a batch is made: enough that handing it over costs nothing beside.
const BYTES: usize = 1 << 20;
/// Records from which it is made, however small they are: what they become may be larger.
const RECORDS: usize = 1 << 12;
/// Batches that are made while the next one is read.
const AHEAD: usize = 2;
/// Bytes from which a batch is waited for: of records as large, one is enough in memory.
const LARGE: usize = 4 * BYTES;
/// How long a thread of the pool that finds no work waits before it looks again.
const PAUSE: Duration = Duration::from_micros(50);

/// Reads with `read`, and hands what `make` makes of each record to `take`.
///
/// # Errors
/// The first that a reader without haste would meet: of `take`, or of `read` once all before it is taken.
pub(super) fn made_in_order<U: Send>(
    make: &(dyn Fn(Place, Raw) -> U + Sync),
    take: &mut dyn FnMut(Place, U) -> Result<()>,
    read: impl FnOnce(Sink<'_>) -> Result<()>,
) -> Result<()> {
    rayon::in_place_scope(|scope| {
        let mut batches =
            Batches { scope, make, take, filling: Vec::new(), bytes: 0, in_work: VecDeque::new() };
        let read = read(&mut |place, raw| batches.push(place, raw));
        batches.finish().and(read)
    })
}

/// A batch that is being made.
type InWork<U> = Receiver<Vec<(Place, U)>>;

struct Batches<'a, 'scope, U> {
    scope: &'a Scope<'scope>,
    make: &'scope (dyn Fn(Place, Raw) -> U + Sync),
    take: &'a mut dyn FnMut(Place, U) -> Result<()>,
    filling: Vec<(Place, Raw)>,
    /// Of the batch that is being filled.
    bytes: usize,
    in_work: VecDeque<InWork<U>>,
}

impl<'scope, U: Send + 'scope> Batches<'_, 'scope, U> {
    fn push(&mut self, place: Place, raw: Raw) -> Result<()> {
        self.bytes += raw.bytes();
        self.filling.push((place, raw));
        if self.bytes < BYTES && self.filling.len() < RECORDS {
            return Ok(());
        }
        let ahead = if self.bytes < LARGE { AHEAD } else { 0 };
        self.make_filled();
        self.take_all_but(ahead)
    }

    fn finish(mut self) -> Result<()> {
        self.make_filled();
        self.take_all_but(0)
    }

    fn make_filled(&mut self) {
        let (batch, make) = (mem::take(&mut self.filling), self.make);
        self.bytes = 0;
        let (made, in_work) = sync_channel(1);
        self.scope.spawn(move |_| {
            let all = batch.into_par_iter().map(|(place, raw)| (place, make(place, raw))).collect();
            // Nobody waits for it once an error has ended the reading.
            made.send(all).ok();
        });
        self.in_work.push_back(in_work);
    }

    fn take_all_but(&mut self, ahead: usize) -> Result<()> {
        while self.in_work.len() > ahead {
            let Some(first) = self.in_work.pop_front() else { break };
            let taken = wait(&first)?.into_iter().try_for_each(|(place, one)| (self.take)(place, one));
            if taken.is_err() {
                self.filling.clear();
                self.in_work.clear();
            }
            taken?;
        }
        Ok(())
    }
}

/// Waits for a batch. A thread of the pool works meanwhile: there may be no other that could make it.
fn wait<T>(batch: &Receiver<T>) -> Result<T> {
    // The panic itself comes out of the scope.
    let panicked = || anyhow!("making a record panicked");
    loop {
        let pause = match rayon::yield_now() {
            None => return batch.recv().map_err(|_| panicked()),
            Some(Yield::Executed) => Duration::ZERO,
            Some(Yield::Idle) => PAUSE,
        };
        match batch.recv_timeout(pause) {
            Ok(made) => return Ok(made),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(panicked()),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    const MANY: u32 = 5 * RECORDS as u32 + 7;

    fn place(record: u32) -> Place {
        Place { record, line: None }
    }

    /// The number of a record, after a while that differs.
    fn number(place: Place, raw: Raw) -> u32 {
        let Raw::Json(text) = raw else { return 0 };
        let turns = u64::from(place.record % 7 * 100);
        std::hint::black_box((0..turns).fold(0, |sum: u64, at| sum ^ std::hint::black_box(at)));
        String::from_utf8(text).unwrap().parse().unwrap()
    }

    /// Reads numbers up to `last` and ends as `end` says; what was taken, `refused` not, and what came back.
    fn taken(last: u32, refused: u32, end: Result<()>) -> (Vec<u32>, Result<()>) {
        let mut taken = Vec::new();
        let mut take = |place: Place, number: u32| {
            assert_eq!(place.record, number);
            if number == refused {
                return Err(anyhow!("{number} is refused"));
            }
            taken.push(number);
            Ok(())
        };
        let read = |sink: Sink<'_>| {
            (1..=last).try_for_each(|at| sink(place(at), Raw::Json(at.to_string().into_bytes())))?;
            end
        };
        let ended = made_in_order(&number, &mut take, read);
        (taken, ended)
    }

    #[test]
    fn records_are_taken_in_their_order() {
        for last in [0, 1, MANY] {
            let (found, ended) = taken(last, 0, Ok(()));
            assert!(ended.is_ok() && found.into_iter().eq(1..=last), "{last}");
        }
    }

    #[test]
    fn nothing_behind_an_error_is_taken_and_it_comes_before_one_of_the_reading() {
        for refused in [1, 17, RECORDS as u32, RECORDS as u32 + 1, MANY] {
            for end in [Ok(()), Err(anyhow!("truncated"))] {
                let (found, ended) = taken(MANY, refused, end);
                assert!(found.into_iter().eq(1..refused), "{refused}");
                assert_eq!(ended.unwrap_err().to_string(), format!("{refused} is refused"));
            }
        }
    }

    #[test]
    fn what_precedes_an_error_of_the_reading_is_taken() {
        for last in [0, 5, MANY] {
            let (found, ended) = taken(last, 0, Err(anyhow!("truncated")));
            assert!(found.into_iter().eq(1..=last), "{last}");
            assert_eq!(ended.unwrap_err().to_string(), "truncated");
        }
    }

    #[test]
    fn the_reading_ends_soon_after_an_error() {
        let mut read = 0;
        let ended = made_in_order(&number, &mut |_, _| Err(anyhow!("no")), |sink| {
            (1..=100 * MANY).try_for_each(|at| {
                read = at;
                sink(place(at), Raw::Json(at.to_string().into_bytes()))
            })
        });
        assert!(ended.is_err() && read as usize <= (AHEAD + 1) * RECORDS, "{read}");
    }

    #[test]
    fn large_records_are_not_read_ahead() {
        let (read, taken) = (Cell::new(0), Cell::new(0));
        let mut take = |_, bytes| {
            taken.set(taken.get() + bytes);
            Ok(())
        };
        let ended = made_in_order(&|_, raw: Raw| raw.bytes(), &mut take, |sink| {
            (1..4).try_for_each(|at| {
                assert_eq!(read.replace(read.get() + LARGE), taken.get());
                sink(place(at), Raw::Json(vec![b' '; LARGE]))
            })
        });
        assert!(ended.is_ok());
        assert_eq!(read, taken);
    }

    #[test]
    fn a_pool_of_one_thread_that_reads_makes_too() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let found = pool.install(|| taken(MANY, 0, Ok(())).0);
        assert_eq!(found.len(), MANY as usize);
        let several = || (0..4).into_par_iter().map(|_| taken(MANY, 0, Ok(())).0.len()).sum::<usize>();
        assert_eq!(pool.install(several), 4 * MANY as usize);
    }

    #[test]
    fn a_panic_comes_out() {
        let make = |place: Place, _: Raw| assert!(place.record != 9, "record 9");
        let read = |sink: Sink<'_>| (1..=MANY).try_for_each(|at| sink(place(at), Raw::Json(Vec::new())));
        let caught = catch_unwind(AssertUnwindSafe(|| made_in_order(&make, &mut |_, ()| Ok(()), read)));
        assert!(caught.is_err());
    }
}
