// Precompiled for this folder: the tensor type with all of its operations takes most of the compile
// time of every file here.
#pragma once

#include <ATen/ATen.h>
