//! Where the GPU's time goes: events on libtorch's stream, read after the work is done.
//!
//! A mark costs the GPU about a microsecond, so a stopwatch runs only when asked to.

use std::collections::BTreeMap;
use std::sync::Mutex;

use anyhow::{Result, anyhow};
use cudarc::driver::{result, sys};

use super::driver::describe;

/// Parts and the event at the end of each stretch.
type Marks = Vec<(&'static str, Event)>;

/// Times stretches of GPU work by name.
#[derive(Debug, Default)]
pub struct Stopwatch {
    marks: Mutex<Option<Marks>>,
}

#[derive(Debug)]
struct Event(sys::CUevent);

// SAFETY: events are the driver's handles; it allows their use from any thread.
unsafe impl Send for Event {}

impl Event {
    fn record() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed)?;
        let event = Self(event);
        // SAFETY: the event was just created; the null stream is always valid.
        unsafe { result::event::record(event.0, std::ptr::null_mut()) }.map_err(failed)?;
        Ok(event)
    }

    fn seconds_since(&self, earlier: &Self) -> Result<f64> {
        // SAFETY: both events are live and recorded.
        unsafe { result::event::synchronize(self.0) }.map_err(failed)?;
        // SAFETY: as above.
        let milliseconds = unsafe { result::event::elapsed(earlier.0, self.0) }.map_err(failed)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by us, not used after this.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Stopwatch {
    /// Begins to take marks.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn start(&self) -> Result<()> {
        let begin = Event::record()?;
        *self.lock()? = Some(vec![("", begin)]);
        Ok(())
    }

    /// Ends a stretch: the work queued since the last mark was for `part`. Does nothing unless started.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn mark(&self, part: &'static str) -> Result<()> {
        if let Some(marks) = self.lock()?.as_mut() {
            marks.push((part, Event::record()?));
        }
        Ok(())
    }

    /// Stops, waits for the GPU and gives the seconds of each part.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn stop(&self) -> Result<BTreeMap<&'static str, f64>> {
        let marks = self.lock()?.take().unwrap_or_default();
        let mut parts = BTreeMap::new();
        for pair in marks.windows(2) {
            *parts.entry(pair[1].0).or_insert(0.0) += pair[1].1.seconds_since(&pair[0].1)?;
        }
        Ok(parts)
    }

    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Option<Marks>>> {
        self.marks.lock().map_err(|_| anyhow!("a mark failed before"))
    }
}

fn failed(error: result::DriverError) -> anyhow::Error {
    anyhow!("the NVIDIA driver says {}", describe(error))
}
