//! Where the pods of a node run that nobody has told of: by the cgroups that the kubelet has made for them, whose names have the pods' UIDs, and the
//! processes that the kernel says are in there. Both of the kubelet's drivers are understood, `systemd` and `cgroupfs`.
//!
//! A pod may be able to make cgroups and namespaces of its own, below its own cgroup. So nothing below a pod's cgroup is taken for another pod's, and
//! of its processes the one that started first counts, which is the runtime's, not the pod's.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// So deep the kubelet's and runtimes' cgroups are below a pod's at most; a pod may make more of its own.
const DEPTH: usize = 6;
/// So many processes of a pod are looked at; the first that started are in the first cgroups.
const PROCESSES: usize = 4096;

/// A namespace that a pod is in. The file keeps it, whatever becomes of the process.
#[derive(Debug)]
pub struct Found {
    pub file: File,
    pub pid: u32,
}

/// The pod that a cgroup is of, by its name.
pub fn pod_uid(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (before, uid) = slice.rsplit_once("-pod")?;
            let ours = ["kubepods", "kubepods-burstable", "kubepods-besteffort"];
            if !ours.iter().any(|level| before == *level || before.ends_with(&format!("-{level}"))) {
                return None;
            }
            uid.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    super::records::is_uid(&uid).then_some(uid)
}

/// Whether a cgroup is one of the kubelet's levels above pods.
fn is_level(name: &str) -> bool {
    match name.strip_suffix(".slice") {
        Some(slice) => {
            let levels = ["kubepods", "kubepods-burstable", "kubepods-besteffort", "kubelet"];
            levels.iter().any(|level| slice == *level || slice.ends_with(&format!("-{level}")))
        }
        None => matches!(name, "kubepods" | "burstable" | "besteffort" | "kubelet"),
    }
}

/// The cgroups of all pods below this one: of the node, or of its pods.
pub fn pods(root: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let (mut found, mut todo) = (Vec::new(), vec![(root.to_owned(), 0)]);
    while let Some((directory, depth)) = todo.pop() {
        for (name, path) in below(&directory)? {
            if let Some(uid) = pod_uid(&name) {
                found.push((uid, path));
            } else if is_level(&name) && depth < DEPTH {
                todo.push((path, depth + 1));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The namespace of a pod's network: of its first process that is in none of `others` (the node's own), each named by device and inode.
pub fn netns(pod: &Path, others: &[(u64, u64)]) -> io::Result<Option<Found>> {
    let mut processes: Vec<(u64, u32)> = Vec::new();
    let mut todo = vec![(pod.to_owned(), 0)];
    while let Some((directory, depth)) = todo.pop() {
        let text = there(fs::read_to_string(directory.join("cgroup.procs")))?.unwrap_or_default();
        for pid in text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0) {
            if processes.len() >= PROCESSES {
                break;
            }
            processes.extend(started(pid)?.map(|began| (began, pid)));
        }
        if depth < DEPTH {
            todo.extend(below(&directory)?.into_iter().map(|(_, path)| (path, depth + 1)));
        }
    }
    processes.sort_unstable();
    for (began, pid) in processes {
        // One that has ended meanwhile, or has only its number left.
        let Some(file) = there(File::open(format!("/proc/{pid}/ns/net")))? else { continue };
        let metadata = file.metadata()?;
        if others.contains(&(metadata.dev(), metadata.ino())) {
            continue;
        }
        // Opened first, then looked at once more: the number may be another process's by now.
        if started(pid)? == Some(began) && is_in(pid, pod)? {
            return Ok(Some(Found { file, pid }));
        }
    }
    Ok(None)
}

/// Device and inode of the namespaces that are the node's own, as far as this process may see them.
pub fn own() -> Vec<(u64, u64)> {
    let paths = ["/proc/self/ns/net", "/proc/1/ns/net"];
    paths.iter().filter_map(|path| fs::metadata(path).ok()).map(|found| (found.dev(), found.ino())).collect()
}

fn below(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let Some(entries) = there(fs::read_dir(directory))? else { return Ok(Vec::new()) };
    let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect())
}

/// Cgroups and processes come and go while they are looked at. Whatever else fails, as where descriptors have run out, says nothing of them.
fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV)) => Ok(None),
        other => other.map(Some),
    }
}

/// When a process began, in the kernel's ticks.
fn started(pid: u32) -> io::Result<Option<u64>> {
    let text = there(fs::read(format!("/proc/{pid}/stat")))?.unwrap_or_default();
    // The name is in brackets and may have any letters.
    let text = String::from_utf8_lossy(&text);
    let fields = text.rsplit_once(')').map(|(_, fields)| fields);
    Ok(fields.and_then(|fields| fields.split_whitespace().nth(19)?.parse().ok()))
}

/// Whether a process is in the pod's cgroup. The path is as seen from this process's cgroup namespace, so its end is compared.
fn is_in(pid: u32, pod: &Path) -> io::Result<bool> {
    let text = there(fs::read_to_string(format!("/proc/{pid}/cgroup")))?;
    let (Some(text), Some(name)) = (text, pod.file_name()) else { return Ok(false) };
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(path.is_some_and(|path| Path::new(path).iter().any(|part| part == name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b9d5a2c-7a0e-4a39-9d4c-2c6f0d1f3b11";

    #[test]
    fn both_drivers_names_have_the_uid_and_others_have_none() {
        let dashed = UID.replace('-', "_");
        for name in [
            format!("kubepods-pod{dashed}.slice"),
            format!("kubepods-burstable-pod{dashed}.slice"),
            format!("kubelet-kubepods-besteffort-pod{dashed}.slice"),
            format!("pod{UID}"),
        ] {
            assert_eq!(pod_uid(&name).as_deref(), Some(UID), "{name}");
        }
        assert_eq!(pod_uid("kubepods-pod8d3f1a.slice").as_deref(), Some("8d3f1a"));
        for name in
            ["kubepods.slice", "system.slice", "user-podx.slice", "pod", "pod../x", "podman", "kubepods-pod.slice"]
        {
            assert!(pod_uid(name).is_none_or(|uid| name == "podman" && uid == "man"), "{name}");
        }
    }

    #[test]
    fn pods_are_found_at_the_kubelets_levels_and_never_below_a_pod() {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "kubepods.slice/kubepods-poda_1.slice/cri-containerd-x.scope",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podb_2.slice",
            "kubepods/besteffort/podc-3",
            // A pod that makes cgroups of its own.
            "kubepods/besteffort/podc-3/kubepods/burstable/podstolen",
            "kubepods/podd-4/podstolen",
            "system.slice/podnone",
        ] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let found: Vec<_> = pods(dir.path()).unwrap().into_iter().map(|(uid, _)| uid).collect();
        assert_eq!(found, ["a-1", "b-2", "c-3", "d-4"]);
        let found: Vec<_> = pods(&dir.path().join("kubepods.slice")).unwrap().into_iter().map(|(uid, _)| uid).collect();
        assert_eq!(found, ["a-1", "b-2"]);
    }

    #[test]
    fn the_nodes_own_namespace_is_no_pods() {
        // A directory by the name of this process's own cgroup, so that it is in there.
        let path = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = path.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned();
        let dir = tempfile::tempdir().unwrap();
        let listing = |name: &str| {
            let pod = dir.path().join(name);
            fs::create_dir_all(&pod).unwrap();
            fs::write(pod.join("cgroup.procs"), format!("0\n{}\nnonsense\n", std::process::id())).unwrap();
            pod
        };
        if let Some(name) = Path::new(&path).file_name() {
            let pod = listing(name.to_str().unwrap());
            assert_eq!(netns(&pod, &[]).unwrap().map(|found| found.pid), Some(std::process::id()));
            assert!(netns(&pod, &own()).unwrap().is_none());
        }
        // Nor one of a process that is not in the pod's cgroup, whatever a file says.
        assert!(netns(&listing("podother"), &[]).unwrap().is_none());
        assert!(started(std::process::id()).unwrap().unwrap() > 0);
    }
}
