//! Streams that come in all at once, and heads that never end, keep nobody else waiting.

use super::*;

/// What 100 streams that come in together see of each other when they are first polled: how many had been handed out.
#[tokio::test]
async fn streams_that_come_together_are_handed_out_by_turns() -> TestResult {
    let handed = Arc::new(AtomicUsize::new(0));
    let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let handle = move |request, stream: ServerStream| {
        handed.fetch_add(1, Ordering::Relaxed);
        let (handed, told) = (Arc::clone(&handed), told.clone());
        async move {
            // Nobody hears it once the test has failed.
            let _ = told.send(handed.load(Ordering::Relaxed));
            echo(request, stream).await;
        }
    };
    let served = served(h2::client::Builder::new(), handle).await?;
    let mut sender = served.sender.clone().ready().await?;
    let mut responses = Vec::new();
    for _ in 0..100 {
        responses.push(sender.send_request(Request::get("http://a/").body(())?, true)?.0);
    }
    for response in responses {
        assert_eq!(response.await?.status(), StatusCode::OK);
    }
    let seen: Vec<usize> = std::iter::from_fn(|| seen.try_recv().ok()).collect();
    assert_eq!((seen.len(), seen[0], seen[99]), (100, 32, 100), "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn headers_without_end_are_ended() -> TestResult {
    // HEADERS without END_HEADERS, then CONTINUATION after CONTINUATION, each of 4 KiB of nothing much.
    let mut flood = vec![0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82];
    for _ in 0..1000 {
        flood.extend_from_slice(&[0, 0x10, 0, 9, 0, 0, 0, 0, 1]);
        flood.extend(std::iter::repeat_n(0x82, 4096));
    }
    let (near, serving) = raw(&flood).await?;
    drop(near);
    assert_eq!(serving.await?.map_err(|error| error.kind), Err(Kind::BadRequest));
    Ok(())
}
