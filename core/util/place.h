/*
 * Where installed files lie. The folders chosen at configure time are used when they exist; a program that was moved with its
 * tree (make install DESTDIR=) or that runs where it was built finds the ones beside itself.
 */
#ifndef CORE_UTIL_PLACE_H
#define CORE_UTIL_PLACE_H

/** Folder of plugins: the configured one, PROGRAM/../lib/arle/plugins, or PROGRAM/.plugins of a build tree. Static. Any thread
 *  after the first call. */
const char *place_plugins(void);
/** Folder of shipped models and shapes: the configured one, or PROGRAM/../share/arle/models, or PROGRAM/../models. Static. */
const char *place_models(void);

#endif
