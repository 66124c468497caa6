/* Attention transfer: the distance between two networks' attention maps, FRSKD's feature loss.
 *
 *   a[n,s] = mean over c of x[n,c,s]^2, over the C channels of the student, the D of the teacher
 *   Q = a / max(|a|, eps) with |a| over the positions s of a sample; P the same of the teacher
 *   loss   = mean over n and s of (Q - P)^2
 *
 *   dl/dx[n,c,s] = 4 / (N S C |a|) * ((Q - P) - Q * h) * x,  h = Q . (Q - P)
 *   Where |a| < eps the length of Q is free: 1/eps instead of 1/|a|, and h = 0. A map of zeros has
 *   Q = 0 and gradient 0.
 *
 * maps holds a of the student, then of the teacher; slopes, for each sample, ratio and factor, with
 *   dl/dx[n,c,s] = 4 / (N S C) * factor * (ratio * a_student - a_teacher) * x
 * Of a sample with an |a| that float64 could not square, maps holds Q and P, and slopes holds 1 - h
 * and -r with r = max(|a|, eps)^(-1/2), whose square would be no number:
 *   dl/dx[n,c,s] = 4 / (N S C) * r * ((1 - h) * Q - P) * x * r
 *
 * Source: Ji, Shin, Hwang, Park, Moon: "Refine Myself by Teaching Myself: Feature Refinement via
 * Self-Knowledge Distillation", arXiv 2103.08273; the loss as in the authors' code, MingiJi/FRSKD,
 * which is that of Zagoruyko, Komodakis, arXiv 1612.03928. The gradient is our own. */
#pragma once
#include "core/contract.h"

/* clang-format off */
#define attention_CONTRACT(X)                       \
    X(IN,      student,     "NC*", FLOATING)        \
    X(IN,      teacher,     "ND*", CONSTANT)        \
    X(REAL,    eps,         POSITIVE, 1e-12)        \
    X(OUT,     loss,        "",    ACC)             \
    X(OUT,     maps,        "2N*", F64)             \
    X(OUT,     slopes,      "2N",  F64)             \
    X(SCRATCH, scratch,     SK_TICKET_BYTES + SK_REDUCE_BYTES_OF(1))

#define attention_backward_CONTRACT(X)              \
    X(GRAD,    grad,        "",    ACC)             \
    X(IN,      student,     "NC*", FLOATING)        \
    X(IN,      maps,        "2N*", F64)             \
    X(IN,      slopes,      "2N",  F64)             \
    X(LIKE,    grad_student, student)
