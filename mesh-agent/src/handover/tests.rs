//! The conversation of two agents in one process, without a kernel side.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use super::*;

fn place(node: &str) -> Place {
    Place { node: node.to_owned(), bpf_dir: "/sys/fs/bpf/mesh".into() }
}

fn file() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/dev/null")?.into())
}

fn own() -> io::Result<OwnListeners> {
    Ok(OwnListeners { admin: file()?, metrics: file()?, readiness: file()? })
}

/// Calls from another thread, as another process would.
async fn called(path: &Path, place: Place) -> io::Result<Option<(Succession, Offered)>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || call(&path, place)).await.map_err(io::Error::other)?
}

#[tokio::test]
async fn sockets_pass_and_the_other_is_told_when_they_are_served() -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("handover.sock");
    assert!(called(&path, place("a")).await?.is_none(), "nobody listens");
    let mut door = Door::open(&path, place("a"), own()?, true)?;
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let share = || listener.as_fd().try_clone_to_owned();
    let offered = OfferedPod {
        namespace: "default".to_owned(),
        name: "client".to_owned(),
        cookie: 7,
        listeners: [share()?, share()?, share()?],
    };
    let successor = async {
        let Some((succession, mut offered)) = called(&path, place("a")).await? else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let pod = offered.pods.pop().ok_or(io::ErrorKind::NotFound)?;
        assert!(offered.made_run_dir && (pod.cookie, &*pod.name) == (7, "client"));
        let [outbound, ..] = pod.listeners;
        assert_eq!(TcpListener::from(outbound).local_addr()?, listener.local_addr()?);
        tokio::task::spawn_blocking(|| succession.serving()).await.map_err(io::Error::other)?
    };
    let server = async {
        let mut asked = door.asked().await;
        asked.offer(file()?, vec![offered]).await?;
        asked.done(Vec::new()).await?;
        io::Result::Ok(asked)
    };
    let (told, _asked) = tokio::try_join!(successor, server)?;
    assert!(told.0.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_successor_of_another_place_is_refused_in_words() -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("handover.sock");
    let _door = Door::open(&path, place("a"), own()?, false)?;
    let refused = called(&path, place("b")).await.map(|_| ()).map_err(|error| error.to_string());
    assert!(refused.is_err_and(|text| text.contains("it serves node a")));
    Ok(())
}

#[tokio::test]
async fn a_successor_that_fails_changes_nothing() -> io::Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("handover.sock");
    let mut door = Door::open(&path, place("a"), own()?, false)?;
    for _ in 0..2 {
        let successor = async { called(&path, place("a")).await.map(drop) };
        let server = async {
            let mut asked = door.asked().await;
            io::Result::Ok(asked.offer(file()?, Vec::new()).await)
        };
        let ((), offered) = tokio::try_join!(successor, server)?;
        let error = offered.map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("hung up")));
    }
    Ok(())
}
