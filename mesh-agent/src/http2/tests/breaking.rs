//! A body that breaks off by itself, whatever its peer takes of it.

use super::*;
use crate::body::Breaking;

impl<F> Breaking for Made<F> where Self: http_body::Body<Data = Bytes, Error = BodyError> + Unpin {}

/// More than the peer has room for, until it is told to break off.
struct Told {
    more: Option<Bytes>,
    broken: oneshot::Receiver<()>,
}

impl http_body::Body for Told {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, BodyError>>> {
        self.more.take().map_or(Poll::Pending, |more| Poll::Ready(Some(Ok(Frame::data(more)))))
    }
}

impl Breaking for Told {
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        let broken = Pin::new(&mut self.broken).poll(cx);
        broken.map(|_| BodyError::Mesh(Error::new(Kind::Denied, "not any more")))
    }
}

#[tokio::test]
async fn it_does_not_wait_for_a_peer_that_takes_nothing() -> TestResult {
    let (tell, broken) = oneshot::channel();
    let body = Mutex::new(Some(Told { more: Some(Bytes::from_static(&[0; 100])), broken }));
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(10);
    let mut served = served(builder, move |_, stream: ServerStream| {
        let body = body.lock().ok().and_then(|mut body| body.take());
        async move {
            let Some(body) = body else { return };
            stream.run(async { Reply::Response(Response::new(body)) }, STALL).await;
        }
    })
    .await?;
    let (response, _) = served.sender.send_request(Request::get("http://a/").body(())?, true)?;
    let mut body = response.await?.into_body();
    let first = body.data().await.ok_or("no data")??;
    assert_eq!(first.len(), 10);
    tell.send(()).map_err(|()| "the body is gone")?;
    let error = body.data().await.ok_or("it ended well")?.map(|_| ()).err().ok_or("more came")?;
    assert!(error.is_reset(), "{error}");
    Ok(())
}
