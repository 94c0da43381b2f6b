//! Copies between a GPU and pinned host memory beside the computation, on a stream of their own.
//!
//! What is copied is named by its tensors; order is kept by events. A copy begins when all that libtorch's stream had to do
//! before is done, copies follow each other, and the computation waits for a copy only where it says so. On the CPU a copy
//! is made at once, so that what uses this can be tested there.

use anyhow::{Context as _, Result, anyhow, ensure};
use cudarc::driver::{result, sys};
use tch::{Device, Kind, Tensor};

use super::bridge;
use super::driver::describe;

/// A stream for copies.
#[derive(Debug)]
pub struct HostCopies {
    /// `None` on the CPU.
    stream: Option<Stream>,
}

#[derive(Debug)]
struct Stream(sys::CUstream);

// SAFETY: the driver allows the use of its streams from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        // Copies that nobody waited for, after an error, must not write into memory that is given away next.
        // SAFETY: created by us and live.
        let _ = unsafe { result::stream::synchronize(self.0) };
        // SAFETY: created by us, not used after this.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// A point in a stream.
#[derive(Debug)]
struct Event(sys::CUevent);

// SAFETY: the driver allows the use of its events from any thread.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by us, not used after this; the driver keeps what still waits for it.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Event {
    fn record(stream: sys::CUstream) -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        let event = Self(event);
        // SAFETY: the event was just created, and the stream is live or the null stream.
        unsafe { result::event::record(event.0, stream) }.map_err(failed)?;
        Ok(event)
    }

    fn hold_back(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event is recorded, and the stream is live or the null stream.
        unsafe { result::stream::wait_event(stream, self.0, flags) }.map_err(failed)
    }
}

/// A copy on its way.
#[derive(Debug)]
pub struct Copying(Option<Event>);

/// libtorch's stream, as in [`super::gpu`].
const COMPUTATION: sys::CUstream = std::ptr::null_mut();

impl HostCopies {
    /// Copies for a device.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn new(device: Device) -> Result<Self> {
        let create = || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed);
        let stream = device.is_cuda().then(create).transpose()?.map(Stream);
        Ok(Self { stream })
    }

    /// Memory on the host that a GPU copies from and to directly.
    ///
    /// # Errors
    /// When there is not enough of it.
    pub fn buffer(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        match self.stream {
            Some(_) => bridge::pinned(shape, kind).context("cannot pin host memory"),
            None => Ok(Tensor::f_empty(shape, (kind, Device::Cpu))?),
        }
    }

    /// Begins a copy once the computation queued so far is done.
    ///
    /// # Errors
    /// When the tensors differ in dtype or shape or are not contiguous, or the driver fails.
    pub fn start(&self, from: &Tensor, to: &Tensor) -> Result<Copying> {
        ensure!(
            from.kind() == to.kind() && from.size() == to.size(),
            "cannot copy {:?} {:?} to {:?} {:?}",
            from.kind(),
            from.size(),
            to.kind(),
            to.size()
        );
        ensure!(from.is_contiguous() && to.is_contiguous(), "copies are of contiguous tensors");
        let Some(Stream(stream)) = &self.stream else {
            to.shallow_clone().f_copy_(from)?;
            return Ok(Copying(None));
        };
        Event::record(COMPUTATION)?.hold_back(*stream)?;
        let bytes = from.numel() * from.kind().elt_size_in_bytes();
        let (source, target) = (from.data_ptr() as sys::CUdeviceptr, to.data_ptr() as sys::CUdeviceptr);
        // SAFETY: both are contiguous and of `bytes` bytes, and the host's is pinned. Both outlive the copy: their owner waits
        // for it, or drops this stream before them, which waits.
        unsafe { sys::cuMemcpyAsync(target, source, bytes, *stream) }.result().map_err(failed)?;
        Ok(Copying(Some(Event::record(*stream)?)))
    }

    /// Lets the computation queued from here on wait for a copy.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn finish(&self, copying: &Copying) -> Result<()> {
        copying.0.as_ref().map_or(Ok(()), |event| event.hold_back(COMPUTATION))
    }
}

fn failed(error: result::DriverError) -> anyhow::Error {
    anyhow!("the NVIDIA driver says {}", describe(error))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let copies = HostCopies::new(Device::Cpu).unwrap();
        let host = copies.buffer(&[3, 4], Kind::Float).unwrap();
        let x = Tensor::randn([3, 4], (Kind::Float, Device::Cpu));
        copies.finish(&copies.start(&x, &host).unwrap()).unwrap();
        assert!(host.equal(&x));
        assert!(copies.start(&x.tr(), &host.tr()).is_err());
        assert!(copies.start(&x, &host.narrow(0, 0, 2)).is_err());
    }
}
