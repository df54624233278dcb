//! On directories that are made for it: what runtimes would read afterwards.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const CALICO: &str = include_str!("../testdata/10-calico.conflist");
const SINGLE: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"mynet\",\n  \"type\": \"bridge\",\n  \"ipam\": {\"type\": \"host-local\"}\n}\n";

struct Node(#[expect(dead_code, reason = "it keeps the directory")] tempfile::TempDir, Place);

impl Node {
    fn with(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Place { configurations: dir.path().join("net.d"), binaries: dir.path().join("bin") };
        fs::create_dir_all(&place.configurations).unwrap();
        for (name, text) in files {
            fs::write(place.configurations.join(name), text).unwrap();
        }
        Self(dir, place)
    }

    fn files(&self) -> BTreeMap<String, (String, u32)> {
        let files = fs::read_dir(&self.1.configurations).unwrap().flatten();
        let read = |entry: fs::DirEntry| {
            let mode = entry.metadata().unwrap().permissions().mode() & 0o7777;
            (entry.file_name().into_string().unwrap(), (fs::read_to_string(entry.path()).unwrap(), mode))
        };
        files.map(read).collect()
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.1.configurations.join(name)
    }
}

fn entry() -> String {
    chain::entry("/run/marline/cni.sock", 30)
}

#[test]
fn the_first_configuration_gets_the_plugin_and_uninstall_gives_back_what_was_there() {
    let node = Node::with(&[("10-calico.conflist", CALICO), ("20-other.conflist", CALICO), ("README", "x")]);
    fs::set_permissions(node.conf("10-calico.conflist"), fs::Permissions::from_mode(0o644)).unwrap();
    let before = node.files();
    assert!(fault(&node.1.configurations).unwrap().contains("10-calico.conflist does not end"));
    assert_eq!(install(&node.1, &entry()).unwrap(), node.conf("10-calico.conflist"));
    assert_eq!(fault(&node.1.configurations), None);
    let after = node.files();
    assert_eq!(after["20-other.conflist"], before["20-other.conflist"]);
    assert_eq!(after["10-calico.conflist"].1, 0o644, "the mode stays");
    assert_eq!(after.len(), before.len(), "and nothing lies about");
    let program = node.1.binaries.join(NAME);
    assert_eq!(fs::read(&program).unwrap(), fs::read("/proc/self/exe").unwrap());
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o777, 0o755);
    assert!(!ensure(&node.1.configurations, &entry()).unwrap().1, "once is enough");
    assert_eq!(uninstall(&node.1, true).unwrap(), [node.conf("10-calico.conflist")]);
    assert_eq!(node.files(), before);
    assert!(program.exists(), "it is to be kept");
    uninstall(&node.1, false).unwrap();
    assert!(!program.exists());
    assert_eq!(uninstall(&node.1, false).unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn a_single_plugins_configuration_becomes_a_list_and_comes_back() {
    let node = Node::with(&[("10-mynet.conf", SINGLE)]);
    let before = node.files();
    assert!(fault(&node.1.configurations).is_some());
    assert_eq!(ensure(&node.1.configurations, &entry()).unwrap(), (node.conf("10-mynet.conflist"), true));
    assert_eq!(first(&node.1.configurations).unwrap(), Some(node.conf("10-mynet.conflist")));
    assert_eq!(fault(&node.1.configurations), None);
    // The CNI writes its file again, changed: that one counts.
    let changed = SINGLE.replace("mynet", "yournet");
    fs::write(node.conf("10-mynet.conf"), &changed).unwrap();
    assert!(fault(&node.1.configurations).is_some());
    ensure(&node.1.configurations, &entry()).unwrap();
    assert!(node.files()["10-mynet.conflist"].0.contains("yournet"));
    uninstall(&node.1, true).unwrap();
    assert_eq!(node.files().keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    assert_eq!(node.files()["10-mynet.conf"].0, changed);
}

#[test]
fn what_cannot_be_understood_is_named_and_left() {
    let node = Node::with(&[]);
    assert!(matches!(ensure(&node.1.configurations, &entry()), Err(CniError::Nothing(_))));
    for (name, text) in [("10-x.conflist", "{\"plugins\""), ("10-x.conflist", "{\"plugins\": []}"), ("10-x.conf", "{}")]
    {
        let node = Node::with(&[(name, text)]);
        let before = node.files();
        let error = ensure(&node.1.configurations, &entry()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        assert!(fault(&node.1.configurations).is_some());
        assert_eq!(node.files(), before);
        uninstall(&node.1, false).unwrap();
        assert_eq!(node.files(), before);
    }
    let both = Node::with(&[("10-x.conf", SINGLE), ("10-x.conflist", CALICO)]);
    let before = both.files();
    assert!(ensure(&both.1.configurations, &entry()).unwrap_err().to_string().contains("10-x.conflist"));
    assert_eq!(both.files(), before);
}

#[test]
fn a_chain_of_a_version_that_the_plugin_does_not_speak_is_left_and_named_with_the_way_out() {
    for (name, text) in [("10-x.conflist", CALICO), ("10-x.conf", SINGLE)] {
        for said in ["0.2.0", "1.2.0"] {
            let node = Node::with(&[(name, &text.replace("0.3.1", said))]);
            let before = node.files();
            let error = ensure(&node.1.configurations, &entry()).unwrap_err().to_string();
            assert!([name, said, "1.1.0", "set one of"].iter().all(|word| error.contains(word)), "{error}");
            assert_eq!(node.files(), before);
        }
        // Weave's.
        let node = Node::with(&[(name, &text.replace("0.3.1", "0.3.0"))]);
        ensure(&node.1.configurations, &entry()).unwrap();
        assert_eq!(fault(&node.1.configurations), None);
        // The version is another now, and the plugin is in there: no pod starts, and the agent says why.
        let list = node.conf("10-x.conflist");
        fs::write(&list, fs::read_to_string(&list).unwrap().replace("0.3.0", "1.2.0")).unwrap();
        let why = fault(&node.1.configurations).unwrap();
        assert!(why.contains("10-x.conflist") && why.contains("1.2.0"), "{why}");
    }
}

/// The old and the new container of an update.
#[test]
fn two_who_write_a_file_at_once_leave_one_of_both_and_nothing_beside_it() {
    let node = Node::with(&[]);
    let file = node.conf("10-x.conflist");
    let texts = ["a".repeat(200_000), "b".repeat(100_000)];
    std::thread::scope(|scope| {
        for text in &texts {
            scope.spawn(|| (0..100).for_each(|_| put(&file, text.as_bytes(), None).unwrap()));
        }
        scope.spawn(|| {
            for _ in 0..500 {
                let now = fs::read_to_string(&file).unwrap_or_else(|_| texts[0].clone());
                assert!(texts.contains(&now), "half of it is there: {} bytes", now.len());
            }
        });
    });
    assert_eq!(node.files().into_keys().collect::<Vec<_>>(), ["10-x.conflist"]);
}

#[test]
fn what_was_left_half_written_goes_when_it_is_old_and_at_the_latest_with_the_plugin() {
    let node = Node::with(&[("10-calico.conflist", CALICO), (".10-calico.conflist.marline-new", "{"), (".other", "x")]);
    let (old, young) =
        (node.conf(".10-calico.conflist.marline-new"), node.1.binaries.join(".marline-cni.marline-new-1"));
    fs::create_dir(&node.1.binaries).unwrap();
    fs::write(&young, "half").unwrap();
    let then = std::time::SystemTime::now() - 2 * ABANDONED;
    File::options().write(true).open(&old).unwrap().set_modified(then).unwrap();
    install(&node.1, &entry()).unwrap();
    assert!(!old.exists() && young.exists(), "somebody may be writing the young one");
    uninstall(&node.1, false).unwrap();
    assert!(!young.exists() && node.conf(".other").exists());
}

#[test]
fn a_list_that_the_cni_has_taken_to_since_stays_when_the_plugin_goes() {
    let node = Node::with(&[("10-mynet.conf", SINGLE)]);
    ensure(&node.1.configurations, &entry()).unwrap();
    fs::write(node.conf("10-mynet.conflist"), CALICO).unwrap();
    ensure(&node.1.configurations, &entry()).unwrap();
    uninstall(&node.1, false).unwrap();
    let left: Vec<_> = node.files().into_iter().map(|(name, (text, _))| (name, text)).collect();
    assert_eq!(left, [("10-mynet.conflist".to_owned(), CALICO.to_owned())]);
}

#[test]
fn an_installation_that_was_killed_half_way_is_finished_by_the_next() {
    let node = Node::with(&[("10-mynet.conf", SINGLE)]);
    ensure(&node.1.configurations, &entry()).unwrap();
    fs::rename(node.conf("10-mynet.conf.marline-original"), node.conf("10-mynet.conf")).unwrap();
    assert!(fault(&node.1.configurations).is_some(), "the list is there and does not count");
    ensure(&node.1.configurations, &entry()).unwrap();
    assert_eq!(fault(&node.1.configurations), None);
    uninstall(&node.1, false).unwrap();
    assert_eq!(node.files().into_keys().collect::<Vec<_>>(), ["10-mynet.conf"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cni_that_rewrites_its_file_gets_the_plugin_again() {
    let node = Node::with(&[]);
    let (place, entry) = (node.1.clone(), entry());
    let watching = tokio::spawn(async move { watch(&place, &entry).await });
    for round in 0..3 {
        fs::write(node.conf("10-calico.conflist"), CALICO).unwrap();
        let there = async {
            while fault(&node.1.configurations).is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), there).await.unwrap_or_else(|_| panic!("round {round}: {:?}", node.files()));
    }
    watching.abort();
    let _ = watching.await;
    uninstall(&node.1, false).unwrap();
    assert_eq!(node.files()["10-calico.conflist"].0, CALICO);
}

#[derive(Clone, Debug)]
enum Step {
    Rewrite,
    AnotherFirst,
    Ensure,
    Uninstall,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// However a CNI and an operator take turns: what is uninstalled is what the CNI has written last.
    #[test]
    fn any_turns_of_a_cni_and_an_operator_end_in_what_the_cni_wrote(
        single: bool,
        steps in prop::collection::vec(prop_oneof![
            3 => Just(Step::Ensure), 2 => Just(Step::Rewrite), 1 => Just(Step::AnotherFirst), 1 => Just(Step::Uninstall),
        ], 0..12),
    ) {
        let (name, text) = if single { ("50-cni.conf", SINGLE) } else { ("50-cni.conflist", CALICO) };
        let node = Node::with(&[(name, text)]);
        let mut written = BTreeMap::from([(name.to_owned(), text.to_owned())]);
        for (at, step) in steps.iter().enumerate() {
            match step {
                Step::Ensure => {
                    ensure(&node.1.configurations, &entry()).unwrap();
                    prop_assert_eq!(fault(&node.1.configurations), None);
                }
                Step::Rewrite => {
                    let text = text.replace("0.3.1", ["0.4.0", "1.0.0"][at % 2]);
                    fs::write(node.conf(name), &text).unwrap();
                    written.insert(name.to_owned(), text);
                }
                Step::AnotherFirst => {
                    let name = format!("{:02}-new.conflist", 40 - at);
                    fs::write(node.conf(&name), CALICO).unwrap();
                    written.insert(name, CALICO.to_owned());
                }
                Step::Uninstall => { uninstall(&node.1, false).unwrap(); }
            }
        }
        uninstall(&node.1, false).unwrap();
        let now: BTreeMap<_, _> = node.files().into_iter().map(|(name, (text, _))| (name, text)).collect();
        prop_assert_eq!(now, written);
    }
}
