//! Files and directories that only their owner may read: the embedded database, the key beside it, and mails.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Creates a directory, and those above it, if they do not exist.
pub fn create_directory(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|error| explain(path, error))
}

/// The options to open a file for writing. If it is created, only its owner can read it.
pub fn options() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// An error about a path. Where rights are missing, it names the file or directory that lacks them, whose that is, and who
/// this process is.
#[cfg(unix)]
pub fn explain(path: &Path, error: io::Error) -> io::Error {
    use std::os::unix::fs::MetadataExt as _;

    if error.kind() != io::ErrorKind::PermissionDenied {
        return error;
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // Nothing below a directory that may not be searched can be seen, and nothing can be made in one that may not be written.
    let seen = path.ancestors().find_map(|path| Some((path, fs::metadata(path).ok()?)));
    let Some((place, found)) = seen else {
        return error;
    };
    let me = rustix::process::geteuid().as_raw();
    let told = format!(
        "permission denied: {} belongs to user {} and has mode {:04o}, and this process runs as user {me}",
        place.display(),
        found.uid(),
        found.mode() & 0o7777
    );
    io::Error::new(io::ErrorKind::PermissionDenied, told)
}

#[cfg(not(unix))]
pub fn explain(_path: &Path, error: io::Error) -> io::Error {
    error
}

/// Checks that this process may read and write a file, and make others beside it. Nothing is opened: closing a file that
/// SQLite has open in this process would drop SQLite's locks on it.
#[cfg(unix)]
pub fn check_access(path: &Path) -> io::Result<()> {
    use rustix::{
        fs::{Access, AtFlags, CWD, accessat},
        io::Errno,
    };

    let path = std::path::absolute(path)?;
    let directory = path.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned);
    for (place, rights) in
        [(&directory, Access::WRITE_OK | Access::EXEC_OK), (&path, Access::READ_OK | Access::WRITE_OK)]
    {
        // What else is wrong shows when the file is opened.
        if let Err(error @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) = accessat(CWD, place, rights, AtFlags::EACCESS)
        {
            return Err(explain(place, error.into()));
        }
    }
    Ok(())
}

#[cfg(not(unix))]
pub fn check_access(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Takes the rights of other users away from a file, if it exists and belongs to the user of this process. Fails if other
/// users have rights to a file that belongs to somebody else.
#[cfg(unix)]
pub fn keep_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;

    let Some(file) = regular_file(path)? else {
        return Ok(());
    };
    let rights_of_others = file.mode() & 0o077;
    if rights_of_others == 0 {
        return Ok(());
    }
    if file.uid() != rustix::process::geteuid().as_raw() {
        let told =
            format!("other users have rights to {}, and it belongs to one of them: chmod 600 it", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, told));
    }
    take_rights_away(path, &file)
}

#[cfg(not(unix))]
pub fn keep_private(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Takes the rights of other users away from a file with a secret that an operator has put there. Where that is impossible,
/// a warning has to do: secrets are mounted into containers read-only, as files of root that all users of the container
/// can read.
#[cfg(unix)]
pub fn keep_secret(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;

    let Some(file) = regular_file(path)? else {
        return Ok(());
    };
    let is_ours = file.uid() == rustix::process::geteuid().as_raw();
    // A file of somebody else can only be read with the rights of a group.
    let rights_of_others = file.mode() & if is_ours { 0o077 } else { 0o007 };
    if rights_of_others == 0 || (is_ours && take_rights_away(path, &file).is_ok()) {
        return Ok(());
    }
    tracing::warn!(
        file = %path.display(),
        mode = format!("{:04o}", file.mode() & 0o7777),
        "other users can read this secret, and this process cannot change that: chmod it to 600, or to 640 if a group needs it"
    );
    Ok(())
}

#[cfg(not(unix))]
pub fn keep_secret(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Warns if every user can read a secret that other programs may share, so that its rights are not ours to change.
#[cfg(unix)]
pub fn warn_if_public(path: &Path) {
    use std::os::unix::fs::MetadataExt as _;

    let Ok(Some(file)) = regular_file(path) else { return };
    if file.mode() & 0o007 != 0 {
        tracing::warn!(
            file = %path.display(),
            mode = format!("{:04o}", file.mode() & 0o7777),
            "other users can read this private key: chmod it to 600, or to 640 if a group needs it"
        );
    }
}

#[cfg(not(unix))]
pub fn warn_if_public(_path: &Path) {}

/// What is known of a file, if it exists. Only a regular file is ever changed: a path that is set by mistake can be a
/// directory such as `/tmp`, whose rights many programs depend on.
#[cfg(unix)]
fn regular_file(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(explain(path, error)),
        Ok(file) => Ok(Some(file).filter(fs::Metadata::is_file)),
    }
}

#[cfg(unix)]
fn take_rights_away(path: &Path, file: &fs::Metadata) -> io::Result<()> {
    use std::{
        fs::Permissions,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    };

    fs::set_permissions(path, Permissions::from_mode(file.mode() & 0o700))?;
    tracing::warn!(file = %path.display(), "other users had rights to this file, which were taken away");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_rights_of_others_are_taken_away() {
        use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        keep_private(&file).expect("there is none");
        fs::write(&file, "secret").expect("a file");
        for (before, after) in [(0o644, 0o600), (0o660, 0o600), (0o400, 0o400), (0o600, 0o600)] {
            fs::set_permissions(&file, Permissions::from_mode(before)).expect("our file");
            keep_private(&file).expect("our file");
            assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, after, "{before:o}");
            fs::set_permissions(&file, Permissions::from_mode(before)).expect("our file");
            keep_secret(&file).expect("our file");
            assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, after, "{before:o}");
        }
        for keep in [keep_private, keep_secret] {
            fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("our directory");
            keep(directory.path()).expect("our directory");
            let mode = fs::metadata(directory.path()).expect("a directory").permissions().mode();
            assert_eq!(mode & 0o777, 0o755, "a directory is left alone");
        }
    }
}
