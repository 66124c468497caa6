/* selfkd: fused self-distillation losses. The public C interface.
 *
 * One function for each operator, `int selfkd_<op>(const selfkd_<op>_args *args, void *stream)`:
 * see selfkd_ops.h and the contract of the operator, <op>.h, for what its arguments mean. Set
 * `struct_size` to sizeof(the struct) and every tensor that you do not give to NULL. Outputs are
 * allocated by the caller; `stream` is a cudaStream_t, ignored for CPU tensors. Functions may be
 * called from any thread. */
#pragma once
#include <stdint.h>

#include "core/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a struct or a function changes so that an older caller would break. */
#define SELFKD_ABI 1

enum selfkd_status {
    SELFKD_OK = 0,
    SELFKD_ERROR_VALUE = 1,  /* a shape, size or number that the operator does not accept */
    SELFKD_ERROR_TYPE = 2,   /* a dtype or device that the operator does not accept */
    SELFKD_ERROR_MEMORY = 3, /* an allocation failed */
    SELFKD_ERROR_CUDA = 4,   /* CUDA is missing, too old, or reported an error */
};

/* The version of the library, "major.minor.patch", and its SELFKD_ABI. */
SELFKD_API const char *selfkd_version(void);
SELFKD_API int selfkd_abi(void);

/* What went wrong in this thread's last failing call: one sentence, valid until its next failing
 * call. */
SELFKD_API const char *selfkd_message(void);

/* The operators' names, separated by '\n'; and the contract of one of them as text, a row per line;
 * NULL for no such. */
SELFKD_API const char *selfkd_operators(void);
SELFKD_API const char *selfkd_describe(const char *op);

/* At most this many threads for one call (n >= 1). Until it is called: OMP_NUM_THREADS, else the
 * number of cores; in a process with PyTorch, torch.set_num_threads() is honoured as well. */
SELFKD_API int selfkd_set_num_threads(int n);

/* The CPU variant: "base", "v3" or "v4" (x86-64 levels). The best that the machine runs is chosen
 * at load; a variant that it does not run is refused. */
SELFKD_API int selfkd_set_isa(const char *name);
SELFKD_API const char *selfkd_isa(void);

/* For tests: how often an operator ran in this process (-1: no such), and how this thread's last
 * call ran, "cpu v4 classes". */
SELFKD_API int64_t selfkd_call_count(const char *op);
SELFKD_API const char *selfkd_last_path(void);

/* The CUDA part: "none: ..." with a reason, or runtime, driver and device count. */
SELFKD_API const char *selfkd_cuda(void);

/* Registers the operators with the PyTorch in this process, as namespace::operator. Called with
 * "selfkd" when the library is loaded, and harmless to repeat. A library has one namespace: another
 * takes the place of the first as long as no operator was called; a second copy of the file can
 * have its own. Returns 1 when they are registered by this library under that name, else 0, and
 * selfkd_torch() says why: the name is none, there is no (supported) PyTorch, or another copy came
 * first. Otherwise it names the shim functions in use. */
SELFKD_API int selfkd_register_torch(const char *name);
SELFKD_API const char *selfkd_torch(void);
SELFKD_API const char *selfkd_torch_namespace(void); /* NULL: not registered */

/* For the Python package, before it registers autograd formulas: removes the guard that refuses
 * calls with gradients. */
SELFKD_API void selfkd_release_autograd_guard(void);

#ifdef __cplusplus
}
#endif

#include "selfkd_ops.h"
