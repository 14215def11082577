//! Keeps the plugin installed on the node for as long as the agent runs there.
//!
//! Promises: the program is in place before the configuration names it, and every file is replaced whole; the configuration that
//! the container runtime uses is found again when another tool has rewritten it; [`Installation::remove`] gives every
//! file back as it was before us, to the byte unless somebody else has changed it since. Never deletes what it has not made.
//! Tested below.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    PLUGIN,
    chain::{self, NoChain},
};
use crate::{
    admin::CNI_INSTALLED,
    identity::write_over,
    watcher::{Pace, Watcher},
};

/// The list we make where the runtime's first choice is a single plugin. It sorts before names that begin with digits, as
/// those of runtimes do: they take the first by name.
const OWN_LIST: &str = "0-mesh.conflist";

/// Endings that runtimes take for configurations.
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// Where things are on this node, as this process sees them.
#[derive(Debug, Clone)]
pub struct Places {
    /// The runtime's programs of plugins (`/opt/cni/bin`).
    pub programs: PathBuf,
    /// The runtime's configurations (`/etc/cni/net.d`).
    pub configurations: PathBuf,
    /// The agent's run directory, by a path that holds on the node too.
    pub run_dir: PathBuf,
}

/// The plugin on this node.
#[derive(Debug)]
pub struct Installation {
    places: Places,
    entry: Value,
    /// What edited files were before, by their names.
    originals: BTreeMap<String, String>,
    /// What was wrong last, said once.
    said: Option<String>,
}

/// What an agent leaves in its run directory for whoever removes the plugin.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    programs: PathBuf,
    configurations: PathBuf,
    originals: BTreeMap<String, String>,
}

impl Record {
    fn read(run_dir: &Path) -> Result<Option<Self>> {
        let path = run_dir.join(CNI_INSTALLED);
        match fs::read(&path) {
            Ok(text) => {
                let record =
                    serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
                Ok(Some(record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
}

impl Installation {
    /// Puts the program in place, and the plugin at the end of the chain where there is one yet.
    ///
    /// # Errors
    /// The program cannot be written. What is wrong with configurations is logged, and tried again when they change.
    pub fn new(places: Places, never: &[String]) -> Result<Self> {
        let entry = json!({
            "type": PLUGIN,
            "socket": places.run_dir.join(super::SOCKET_NAME),
            "namespaces": places.run_dir.join(super::NAMESPACES_NAME),
            "never": never,
        });
        let originals = Record::read(&places.run_dir).ok().flatten().map(|record| record.originals);
        let mut installation = Self { places, entry, originals: originals.unwrap_or_default(), said: None };
        // Before anything is changed: whoever cleans up after a crash knows where.
        installation.note()?;
        installation.put_program(Path::new("/proc/self/exe"))?;
        installation.look();
        Ok(installation)
    }

    /// What an agent that has ended left on this node, by its run directory; `None`: nothing.
    ///
    /// # Errors
    /// Its record cannot be read.
    pub fn left_in(run_dir: &Path) -> Result<Option<Self>> {
        let of_record = |Record { programs, configurations, originals }| {
            let places = Places { programs, configurations, run_dir: run_dir.to_path_buf() };
            Self { places, entry: Value::Null, originals, said: None }
        };
        Ok(Record::read(run_dir)?.map(of_record))
    }

    /// The files outside of the run directory that it is in.
    pub fn files(&self) -> Vec<PathBuf> {
        let program = Some(self.places.programs.join(PLUGIN)).filter(|path| path.exists());
        let names = self.names().unwrap_or_default().into_iter();
        let paths = names.map(|name| self.places.configurations.join(name));
        program.into_iter().chain(paths.filter(|path| without_us(path).is_some())).collect()
    }

    /// Follows the directory of configurations; ends never.
    ///
    /// # Errors
    /// It cannot be watched.
    pub async fn keep(&mut self) -> Result<()> {
        let dir = &self.places.configurations;
        let mut watcher = Watcher::new(dir.clone(), Pace::Together)
            .with_context(|| format!("watching {}", dir.display()))?;
        loop {
            self.look();
            watcher.changed().await;
            watcher.renew();
        }
    }

    fn put_program(&self, exe: &Path) -> Result<()> {
        let program = self.places.programs.join(PLUGIN);
        let contents = fs::read(exe).context("reading this program")?;
        if fs::read(&program).is_ok_and(|there| there == contents) {
            return Ok(());
        }
        write_over(&program, 0o755, &contents).context("--cni-bin-dir")
    }

    /// Brings the chain up to date; what fails is logged once.
    fn look(&mut self) {
        let said = match self.chain() {
            Ok(()) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(text) = said.as_ref().filter(|_| said != self.said) {
            tracing::warn!("pods start without waiting for their enrolment: {text}");
        }
        self.said = said;
    }

    fn chain(&mut self) -> Result<()> {
        let names = self.names()?;
        let Some(first) = names.iter().find(|name| *name != OWN_LIST) else {
            bail!("there is no CNI configuration in {} yet", self.places.configurations.display());
        };
        let path = self.places.configurations.join(first);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let conf: Value =
            serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        let named = |error: NoChain| anyhow::anyhow!("{}: {error}", path.display());
        if conf.get("plugins").is_some() {
            if let Some(chained) = chain::with(&conf, &self.entry).map_err(named)? {
                if chain::without(&conf).is_none() {
                    self.originals.insert(first.clone(), text);
                    self.note()?;
                }
                self.write(first, &format!("{chained:#}\n"))?;
                tracing::info!(file = %path.display(), "the mesh is in the chain of CNI plugins");
            }
            self.remove_own_list()?;
        } else {
            let list = format!("{:#}\n", chain::of_single(&conf, &self.entry).map_err(named)?);
            let own = self.places.configurations.join(OWN_LIST);
            if fs::read_to_string(&own).ok().as_ref() != Some(&list) {
                self.write(OWN_LIST, &list)?;
                tracing::info!(file = %own.display(), "the mesh has chained itself behind a single CNI plugin");
            }
        }
        // The runtime's choice may have been another one before.
        for name in names.iter().filter(|name| *name != first && *name != OWN_LIST) {
            self.restore(name)?;
        }
        Ok(())
    }

    /// Takes the plugin out of the chain and off the node; tells of what it could not do, having done the rest.
    ///
    /// # Errors
    /// Something of it stays.
    pub fn remove(mut self) -> Result<()> {
        let names = match self.names() {
            Ok(names) => names,
            // Whoever removed the node's network has removed ours with it.
            Err(_) if !self.places.configurations.exists() => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut failed = self.remove_own_list().err();
        for name in names.iter().filter(|name| *name != OWN_LIST) {
            failed = self.restore(name).err().or(failed);
        }
        // The program last: until then a configuration may name it.
        for path in [self.places.programs.join(PLUGIN), self.places.run_dir.join(CNI_INSTALLED)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    failed = Some(anyhow::Error::new(error).context(format!("removing {}", path.display())));
                }
                _ => {}
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The configurations, as runtimes sort them.
    fn names(&self) -> Result<Vec<String>> {
        let dir = &self.places.configurations;
        let entries =
            fs::read_dir(dir).with_context(|| format!("--cni-conf-dir: reading {}", dir.display()))?;
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
                !name.starts_with('.') && ending.is_some_and(|ending| ENDINGS.contains(&ending))
            })
            .collect();
        names.sort();
        Ok(names)
    }

    /// Gives a file back as it was before us, where we are in it.
    fn restore(&mut self, name: &str) -> Result<()> {
        let path = self.places.configurations.join(name);
        let Some(without) = without_us(&path) else { return Ok(()) };
        let original = self.originals.remove(name);
        let same =
            original.filter(|text| serde_json::from_str::<Value>(text).ok().as_ref() == Some(&without));
        self.write(name, &same.unwrap_or_else(|| format!("{without:#}\n")))?;
        tracing::info!(file = %path.display(), "the mesh is out of the chain of CNI plugins");
        Ok(())
    }

    fn remove_own_list(&self) -> Result<()> {
        let path = self.places.configurations.join(OWN_LIST);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn note(&self) -> Result<()> {
        let Places { programs, configurations, run_dir } = self.places.clone();
        let record = Record { programs, configurations, originals: self.originals.clone() };
        let path = run_dir.join(CNI_INSTALLED);
        Ok(write_over(&path, 0o600, serde_json::to_string(&record)?.as_bytes())?)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.places.configurations.join(name);
        let mode = fs::metadata(&path).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
        Ok(write_over(&path, mode, text.as_bytes())?)
    }
}

/// The list in this file without our entry; `None`: it has none, or is no list.
fn without_us(path: &Path) -> Option<Value> {
    let text = fs::read_to_string(path).ok()?;
    chain::without(&serde_json::from_str(&text).ok()?)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const CALICO: &str =
        "{ \"cniVersion\": \"1.0.0\",\n  \"name\": \"net\", \"plugins\": [ {\"type\": \"ptp\"} ] }";

    struct Node(TempDir);

    impl Node {
        fn new() -> Self {
            let node = Self(tempfile::tempdir().unwrap());
            for dir in ["bin", "net.d", "run"] {
                fs::create_dir(node.0.path().join(dir)).unwrap();
            }
            node
        }

        fn places(&self) -> Places {
            let dir = |name| self.0.path().join(name);
            Places { programs: dir("bin"), configurations: dir("net.d"), run_dir: dir("run") }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.path().join("net.d").join(name), text).unwrap();
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join("net.d").join(name)).unwrap()
        }

        /// The plugins of a list, in its order.
        fn chain(&self, name: &str) -> Vec<String> {
            let list: Value = serde_json::from_str(&self.text(name)).unwrap();
            list["plugins"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one["type"].as_str().unwrap().to_owned())
                .collect()
        }

        fn files(&self, dir: &str) -> Vec<String> {
            let entries = fs::read_dir(self.0.path().join(dir)).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn install(&self) -> Installation {
            Installation::new(self.places(), &["kube-system".to_owned()]).unwrap()
        }
    }

    #[test]
    fn what_was_there_before_is_there_again_to_the_byte() {
        let node = Node::new();
        node.write("10-calico.conflist", CALICO);
        let path = node.0.path().join("net.d/10-calico.conflist");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        drop(node.install());
        assert_eq!(node.chain("10-calico.conflist"), ["ptp", PLUGIN]);
        let program = node.0.path().join("bin").join(PLUGIN);
        assert_eq!(fs::metadata(program).unwrap().permissions().mode() & 0o777, 0o755);
        // An agent that has started anew knows what the one before found; and so does whoever cleans up.
        drop(node.install());
        let left = Installation::left_in(&node.places().run_dir).unwrap().unwrap();
        assert_eq!(left.files(), [node.places().programs.join(PLUGIN), path.clone()]);
        left.remove().unwrap();
        assert!(Installation::left_in(&node.places().run_dir).unwrap().is_none());
        assert_eq!(node.text("10-calico.conflist"), CALICO);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!((node.files("net.d").len(), node.files("bin").len(), node.files("run").len()), (1, 0, 0));
    }

    #[test]
    fn a_configuration_that_others_have_changed_since_keeps_their_changes() {
        let node = Node::new();
        node.write("10-calico.conflist", CALICO);
        let installation = node.install();
        let list = node.text("10-calico.conflist").replace("\"ptp\"", "\"bridge\"");
        node.write("10-calico.conflist", &list);
        installation.remove().unwrap();
        assert_eq!(node.chain("10-calico.conflist"), ["bridge"]);
    }

    #[test]
    fn the_chain_is_that_of_the_runtimes_choice() {
        let node = Node::new();
        let mut installation = node.install();
        assert!(installation.said.as_ref().is_some_and(|said| said.contains("no CNI configuration")));
        node.write("20-second.conflist", CALICO);
        installation.look();
        assert_eq!(node.chain("20-second.conflist"), ["ptp", PLUGIN]);
        assert_eq!(installation.said, None);
        // Another tool comes, which runtimes prefer.
        node.write("10-first.conflist", CALICO);
        installation.look();
        assert_eq!(node.chain("10-first.conflist"), ["ptp", PLUGIN]);
        assert_eq!(node.text("20-second.conflist"), CALICO);
        // And rewrites its file.
        node.write("10-first.conflist", CALICO);
        installation.look();
        assert_eq!(node.chain("10-first.conflist"), ["ptp", PLUGIN]);
        installation.remove().unwrap();
        assert_eq!(node.text("10-first.conflist"), CALICO);
    }

    #[test]
    fn a_single_plugin_is_left_as_it_is_and_chained_in_a_list_before_it() {
        let node = Node::new();
        let single = r#"{"cniVersion": "0.4.0", "name": "net", "type": "bridge"}"#;
        node.write("10-bridge.conf", single);
        let mut installation = node.install();
        assert_eq!(node.chain(OWN_LIST), ["bridge", PLUGIN]);
        assert_eq!(node.files("net.d")[0], OWN_LIST, "runtimes do not choose it");
        assert_eq!(node.text("10-bridge.conf"), single);
        node.write("10-bridge.conf", &single.replace("bridge", "ptp"));
        installation.look();
        assert_eq!(node.chain(OWN_LIST), ["ptp", PLUGIN]);
        installation.remove().unwrap();
        assert_eq!(node.files("net.d"), ["10-bridge.conf"]);
    }

    #[test]
    fn a_broken_configuration_is_left_alone_and_told_of() {
        let node = Node::new();
        node.write("10-broken.conflist", "{");
        let mut installation = node.install();
        assert!(installation.said.as_ref().is_some_and(|said| said.contains("10-broken.conflist")));
        assert_eq!(node.text("10-broken.conflist"), "{");
        node.write("10-broken.conflist", r#"{"plugins": []}"#);
        installation.look();
        assert!(installation.said.as_ref().is_some_and(|said| said.contains("no plugins")));
        installation.remove().unwrap();
    }

    #[tokio::test]
    async fn a_rewritten_configuration_is_chained_again() {
        let node = Node::new();
        node.write("10-calico.conflist", CALICO);
        let mut installation = node.install();
        let keeping = tokio::spawn(async move { installation.keep().await });
        let mut watcher = Watcher::new(node.places().configurations, Pace::Together).unwrap();
        node.write("10-calico.conflist", CALICO);
        while node.text("10-calico.conflist") == CALICO {
            watcher.changed().await;
        }
        assert_eq!(node.chain("10-calico.conflist"), ["ptp", PLUGIN]);
        keeping.abort();
    }
}
