//! SIGINT, SIGTERM and SIGHUP (a terminal that went away) end a training at the next step boundary, with a checkpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::kernels::exit_now;
use crate::progress;

/// Set when the process was asked to end.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens on a thread of its own for the rest of the process; where signals cannot be heard, never fires.
    pub fn listen() -> Self {
        let interrupt = Self::default();
        let asked = Arc::clone(&interrupt.asked);
        let listener = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            if let Ok(runtime) = runtime
                && runtime.block_on(signal()).is_ok()
            {
                asked.store(true, Ordering::Relaxed);
                progress::note("ending after this step with a checkpoint; ask again to end at once");
                if runtime.block_on(signal()).is_ok() {
                    // As a shell reports a process that SIGINT ended; the last checkpoint is whole.
                    exit_now(130);
                }
            }
        };
        std::thread::Builder::new().name("signals".to_string()).spawn(listener).ok();
        interrupt
    }

    /// Whether the process was asked to end.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let [mut interrupt, mut terminate, mut hangup] =
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}
