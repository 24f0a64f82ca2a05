//! The HTTP server: OpenAI's chat completions, completions and responses, and Anthropic's messages, for one model.
//!
//! A request is read and checked completely ([`ask`]), rendered to tokens, and handed to the scheduler; what comes back is
//! written by the dialect's own encoder. Nothing here knows tensors, and nothing but [`ask`] knows all dialects.
#![forbid(unsafe_code)]

mod app;
mod ask;
mod chat;
mod completions;
mod conversation;
mod error;
mod http;
mod messages;
mod metrics;
mod models;
mod parts;
mod read;
mod reply;
mod responses;
mod stream;
mod trace;

pub use app::{App, Options};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Connections that are open at once.
const CONNECTIONS: usize = 1024;
/// Time in which a request's head must have come, and in which an idle connection is kept.
const HEAD_TIME: Duration = Duration::from_secs(75);
/// Bytes of a request's head.
const MOST_HEAD: usize = 64 << 10;

/// Serves until `stop` is true, then lets answers end for `grace`.
///
/// A client that closes its half of a connection has gone: its request is cancelled.
pub async fn serve(app: Arc<App>, listener: TcpListener, mut stop: watch::Receiver<bool>, grace: Duration) {
    let router = http::router(Arc::clone(&app));
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Those that find no room wait in the listener's queue.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { break };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of files, as a rule: others will close some.
                tracing::warn!("no connection can be accepted: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let stop = stop.clone();
        tokio::spawn(async move {
            connection(stream, service, stop).await;
            drop(permit);
        });
    }
    app.set_stopping();
    app.scheduler.shut_down(grace);
    drop(listener);
    // All permits are there again when all connections are closed.
    let all_closed = room.acquire_many(CONNECTIONS as u32);
    if tokio::time::timeout(grace + Duration::from_secs(5), all_closed).await.is_err() {
        tracing::warn!("some connections did not end in time");
    }
}

/// Waits until it is time to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Whoever could say so has gone: it is time, too.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection(
    stream: TcpStream,
    service: TowerToHyperService<axum::Router>,
    mut stop: watch::Receiver<bool>,
) {
    // Events are small and should not wait for each other.
    let _ = stream.set_nodelay(true);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(MOST_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!("connection: {e}");
    }
}
