//! Answers as server-sent events.

use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::answer::{Answer, End, Piece};
use super::error::ApiError;

/// Events that may wait for a slow reader before the answer waits too.
const BUFFER: usize = 64;

/// What a stream is told of, in this order.
#[derive(Debug)]
pub enum Told {
    /// The answer was taken up.
    Begin,
    /// A piece of it.
    Text(String),
    /// Its end; nothing follows.
    End(End),
    /// It could not be finished; nothing follows.
    Failed(ApiError),
}

/// Streams an answer; `tell` puts each step into events.
///
/// The client's going away is noticed at once, not at the next token: dropping the answer cancels its generation.
pub fn events(mut answer: Answer, mut tell: impl FnMut(Told) -> Vec<Event> + Send + 'static) -> Response {
    let (sender, receiver) = mpsc::channel::<Result<Event, Infallible>>(BUFFER);
    tokio::spawn(async move {
        let mut told = Told::Begin;
        loop {
            let is_last = matches!(told, Told::End(_) | Told::Failed(_));
            for event in tell(told) {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            if is_last {
                return;
            }
            told = tokio::select! {
                () = sender.closed() => return,
                piece = answer.next() => match piece {
                    Ok(Piece::Text(text)) => Told::Text(text),
                    Ok(Piece::End(end)) => Told::End(end),
                    Err(error) => Told::Failed(error),
                },
            };
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()).into_response()
}
