//! Row movers: embed, gather, scatter, scatter-add, concat, ranges; and upload, reshape, to_host.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Device, Tensor};
use millrace_kernels::{Backend, CpuBackend};
use support::{Random, assert_refused, backends, bits, round};

#[test]
fn rows_arrive_as_they_are() {
    let mut random = Random::fresh();
    for (_, backend) in backends() {
        let table = random.values(backend.dtype(), 13 * 5);
        let tensor = backend.upload(&table, &[13, 5]).unwrap();
        let ids = vec![0, 12, 7, 7];
        let expected: Vec<f32> = ids.iter().flat_map(|&id| table[id as usize * 5..][..5].to_vec()).collect();
        assert_eq!(backend.to_host(&backend.embed(&tensor, &ids).unwrap()).unwrap(), expected);
        assert_eq!(backend.to_host(&backend.gather_rows(&tensor, &ids).unwrap()).unwrap(), expected);
        assert_eq!(backend.shape(&backend.embed(&tensor, &vec![]).unwrap()), [0, 5]);
        assert_refused(backend.embed(&tensor, &vec![3, 13]), "embed");
        assert_refused(backend.gather_rows(&tensor, &vec![u32::MAX]), "gather_rows");
    }
}

#[test]
fn scatter_touches_its_rows_only() {
    let mut random = Random::fresh();
    for (_, backend) in backends() {
        let dtype = backend.dtype();
        let (x, v) = (random.values(dtype, 9 * 3), random.values(dtype, 2 * 3));
        let (xs, vs) = (backend.upload(&x, &[9, 3]).unwrap(), backend.upload(&v, &[2, 3]).unwrap());
        let (mut replaced, mut added) = (x.clone(), x.clone());
        for (row, value) in [8, 2].into_iter().zip(v.chunks_exact(3)) {
            for (i, value) in value.iter().enumerate() {
                replaced[row * 3 + i] = *value;
                added[row * 3 + i] = round(dtype, x[row * 3 + i] + value);
            }
        }
        assert_eq!(backend.to_host(&backend.scatter_rows(&xs, &vec![8, 2], &vs).unwrap()).unwrap(), replaced);
        assert_eq!(backend.to_host(&backend.scatter_add_rows(&xs, &vec![8, 2], &vs).unwrap()).unwrap(), added);
        assert_eq!(backend.to_host(&xs).unwrap(), x, "the input changed");
        assert_refused(backend.scatter_rows(&xs, &vec![9, 2], &vs), "scatter_rows");
        assert_refused(backend.scatter_rows(&xs, &vec![1], &vs), "scatter_rows");
        assert_refused(backend.scatter_add_rows(&xs, &vec![1, 9], &vs), "scatter_add_rows");
        assert_refused(backend.scatter_add_rows(&xs, &vec![1, 2, 3], &vs), "scatter_add_rows");
    }
}

#[test]
fn concat_stacks() {
    for (_, backend) in backends() {
        let a = backend.upload(&[1.0, 2.0], &[1, 2]).unwrap();
        let none = backend.upload(&[], &[0, 2]).unwrap();
        let b = backend.upload(&[3.0, 4.0, 5.0, 6.0], &[2, 2]).unwrap();
        let all = backend.concat_rows(&[a.clone(), none, b]).unwrap();
        assert_eq!(
            (backend.shape(&all), backend.to_host(&all).unwrap()),
            (vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        );
        let wide = backend.upload(&[0.0; 3], &[1, 3]).unwrap();
        assert_refused(backend.concat_rows(&[a, wide]), "concat_rows");
        assert_refused(backend.concat_rows(&[]), "concat_rows");
    }
}

#[test]
fn row_ranges_are_views() {
    for (_, backend) in backends() {
        let x = backend.upload(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2]).unwrap();
        let (first, rest) = (backend.row_range(&x, 0..1).unwrap(), backend.row_range(&x, 1..3).unwrap());
        assert_eq!((backend.shape(&rest), backend.to_host(&rest).unwrap()), (vec![2, 2], vec![3.0, 4.0, 5.0, 6.0]));
        assert_eq!(backend.shape(&backend.row_range(&x, 3..3).unwrap()), [0, 2]);
        let again = backend.row_range(&rest, 1..2).unwrap();
        assert_eq!(backend.to_host(&backend.add(&again, &first).unwrap()).unwrap(), [6.0, 8.0]);
        let all = backend.concat_rows(&[first, rest]).unwrap();
        assert_eq!(backend.to_host(&all).unwrap(), backend.to_host(&x).unwrap());
        assert_refused(backend.row_range(&x, 1..4), "row_range");
        assert_refused(backend.row_range(&x, std::ops::Range { start: 2, end: 1 }), "row_range");
        assert_refused(backend.row_range(&backend.reshape(&x, &[6]).unwrap(), 0..1), "row_range");
    }
}

#[test]
fn views_of_a_tensor_and_other_dtypes_are_taken_as_weights() {
    for (_, backend) in backends() {
        let host = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu).unwrap();
        let weight = backend.weight(&host.t().unwrap()).unwrap();
        assert_eq!(weight.dtype(), backend.dtype());
        assert_eq!(backend.to_host(&weight).unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        // A row range shares its parent's storage, at an offset.
        let tail = weight.narrow(0, 1, 2).unwrap();
        assert_eq!(backend.to_host(&backend.gather_rows(&tail, &vec![1, 0]).unwrap()).unwrap(), [3.0, 6.0, 2.0, 5.0]);
        let flat = backend.reshape(&tail, &[4]).unwrap();
        assert_eq!((backend.shape(&flat), bits(&backend, &flat).len()), (vec![4], 4));
        assert_refused(backend.reshape(&tail, &[5]), "reshape");
        assert_refused(backend.upload(&[1.0], &[2]), "upload");
        let strided = weight.t().unwrap();
        assert_refused(backend.gather_rows(&strided, &vec![0]), "gather_rows");
    }
    assert_refused(CpuBackend::new(DType::F16), "cpu_backend");
}
