//! Listening, and ending in good order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Service;
use super::router::router;
use crate::error::HintExt as _;
use crate::progress;

/// How long requests may go on after the first signal.
const DRAIN: Duration = Duration::from_secs(30);

/// How long after the first signal a connection may go on that no request is open on: its last answer is on the way to
/// a slow client, or half a request has come.
const GRACE: Duration = Duration::from_secs(1);

/// Listens on `address`, tells the real one to `ready`, and answers until SIGINT or SIGTERM.
///
/// The first signal ends listening and lets requests finish for half a minute; the second, or the time's running out,
/// ends them. The engine ends with the service; after requests were cut off it may still be in a step.
///
/// # Errors
/// When the address is taken or `ready` fails.
pub fn run(
    service: Service,
    address: SocketAddr,
    ready: impl FnOnce(SocketAddr) -> Result<()>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the threads of the service")?;
    let served = runtime.block_on(async {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}"))
            .hint("is another server running there? `--port 0` takes a free port")?;
        let (stop, signals) = signals()?;
        ready(listener.local_addr().context("the socket has no address")?)?;
        serve(service, listener, signals).await?;
        drop(stop);
        Ok(())
    });
    // Answers that were cut off must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// Counts the signals that ask for an end; the task lives as long as the sender that is given back.
fn signals() -> Result<(Arc<watch::Sender<u32>>, watch::Receiver<u32>)> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let (sender, receiver) = watch::channel(0);
    let sender = Arc::new(sender);
    let counter = Arc::clone(&sender);
    tokio::spawn(async move {
        loop {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
            counter.send_modify(|count| *count += 1);
        }
    });
    Ok((sender, receiver))
}

/// Answers on `listener` until `signals` counts one, then finishes what is open, until it counts two or half a minute is
/// over.
///
/// # Errors
/// When the listener fails.
pub async fn serve(service: Service, listener: TcpListener, signals: watch::Receiver<u32>) -> Result<()> {
    let service = Arc::new(service);
    let draining = drain(Arc::clone(&service), signals.clone());
    let server = axum::serve(listener, router(Arc::clone(&service))).with_graceful_shutdown(draining);
    tokio::select! {
        served = async { server.await } => served.context("the server failed"),
        () = idle(&service, signals.clone()) => Ok(()),
        () = cut_off(signals) => {
            progress::note("stopped before all requests were finished");
            Ok(())
        }
    }
}

/// Waits for the first signal, and tells what is finished before the end.
async fn drain(service: Arc<Service>, mut signals: watch::Receiver<u32>) {
    signals.wait_for(|count| *count >= 1).await.ok();
    match service.open() {
        0 => progress::note("stopping"),
        open => {
            progress::note(format!("stopping: {open} requests are finished first; a second signal ends them"))
        }
    }
}

/// Waits for the first signal, and then until no request has been open for [`GRACE`]: a client that sent half a request
/// does not hold the service.
async fn idle(service: &Service, mut signals: watch::Receiver<u32>) {
    signals.wait_for(|count| *count >= 1).await.ok();
    let mut since = Instant::now();
    while since.elapsed() < GRACE {
        tokio::time::sleep(GRACE / 20).await;
        if service.open() > 0 {
            since = Instant::now();
        }
    }
}

/// Waits for the first signal, and then for the second or the end of [`DRAIN`].
async fn cut_off(mut signals: watch::Receiver<u32>) {
    signals.wait_for(|count| *count >= 1).await.ok();
    tokio::time::timeout(DRAIN, signals.wait_for(|count| *count >= 2)).await.ok();
}
