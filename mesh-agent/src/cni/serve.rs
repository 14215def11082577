//! The agent's side: hears of pods, and says what has become of them.
//!
//! Promises to answer each plugin by itself, however long another one waits, and to stop working for one that has gone. Never
//! trusts what it is told beyond its shape: the socket is root's alone, and who is enrolled is the configuration's to say.
//! Tested below.

use std::{future::Future, io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    sync::Semaphore,
    time::timeout,
};

use super::{Answer, LONGEST_LINE, Request};
use crate::admin::Socket;

/// How long a plugin may take to say what it wants: it has all of it when it calls.
const SAYING: Duration = Duration::from_secs(5);

/// Plugins that are answered at a time: a node starts no more pods at once.
const AT_ONCE: usize = 512;

/// Pause after a failure to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers plugins for as long as it is polled.
pub async fn serve<Handler, Answering>(socket: Socket, handler: Handler)
where
    Handler: Fn(Request) -> Answering + Clone + Send + 'static,
    Answering: Future<Output = Answer> + Send,
{
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match socket.accept().await {
            Ok(stream) => {
                let handler = handler.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, handler).await {
                        tracing::debug!(%error, "a CNI plugin called and was not answered");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "CNI plugins cannot be heard");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer<Handler, Answering>(stream: UnixStream, handler: Handler) -> io::Result<()>
where
    Handler: Fn(Request) -> Answering,
    Answering: Future<Output = Answer>,
{
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(LONGEST_LINE));
    let mut line = String::new();
    timeout(SAYING, reader.read_line(&mut line)).await??;
    let request: Request = serde_json::from_str(&line)?;
    let answer = tokio::select! {
        answer = handler(request) => answer,
        // Nothing more is said: what ends the wait is the plugin's end.
        _ = reader.read_u8() => return Err(io::ErrorKind::ConnectionReset.into()),
    };
    let mut line = serde_json::to_string(&answer)?;
    line.push('\n');
    writer.write_all(line.as_bytes()).await
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::path::PathBuf;

    use tokio::{
        sync::{mpsc, oneshot},
        task::{JoinHandle, spawn_blocking},
    };

    use super::*;
    use crate::cni::{Verb, ask};

    const PATIENCE: Duration = Duration::from_secs(20);

    fn request(pod: &str) -> Request {
        let text = format!(r#"{{"verb":"add","namespace":"shop","pod":"{pod}"}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn asked(socket: PathBuf, pod: &str) -> JoinHandle<io::Result<Answer>> {
        let request = request(pod);
        spawn_blocking(move || ask(&socket, &request, PATIENCE))
    }

    #[tokio::test]
    async fn who_waits_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.sock");
        let (waiting, mut waits) = mpsc::unbounded_channel();
        let handler = move |request: Request| {
            let waiting = waiting.clone();
            async move {
                assert_eq!(request.verb, Verb::Add);
                if request.pod == "quick" {
                    return Answer::NotEnrolled;
                }
                let (answer, answered) = oneshot::channel();
                waiting.send(answer).unwrap();
                answered.await.unwrap()
            }
        };
        let serving = tokio::spawn(serve(Socket::put(&path).unwrap(), handler));
        let slow = asked(path.clone(), "slow");
        let answer = waits.recv().await.unwrap();
        assert_eq!(asked(path.clone(), "quick").await.unwrap().unwrap(), Answer::NotEnrolled);
        answer.send(Answer::Enrolled).unwrap();
        assert_eq!(slow.await.unwrap().unwrap(), Answer::Enrolled);

        // A plugin that goes while it waits is waited for no more.
        let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let line = format!("{}\n", serde_json::to_string(&request("gone")).unwrap());
        io::Write::write_all(&mut &stream, line.as_bytes()).unwrap();
        let mut answer = waits.recv().await.unwrap();
        drop(stream);
        answer.closed().await;

        // Nonsense ends its own call alone.
        let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        io::Write::write_all(&mut &stream, b"nonsense\n").unwrap();
        assert_eq!(asked(path, "quick").await.unwrap().unwrap(), Answer::NotEnrolled);
        serving.abort();
    }
}
