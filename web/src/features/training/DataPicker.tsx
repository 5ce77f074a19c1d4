import { CopyText } from '@/components/CopyText';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { ApiError, upload } from '@/lib/api';
import { ago, bytes } from '@/lib/format';
import { file } from '@/types/api';
import { ActionIcon, Alert, Button, FileButton, Progress, Radio, Text } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import css from './DataPicker.module.css';
import { deleteFile, filesQuery } from './queries';
import { reportOf } from './report';

const EXAMPLE = `{"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Arr, I be fine!"}]}
{"instruction": "Add.", "input": "1 and 2", "output": "3"}
{"prompt": "Ship: ", "completion": "a vessel that sails the sea"}
{"text": "Plain text to go on from."}`;

export function DataPicker({ value, onChange }: { value: string | null; onChange: (id: string | null) => void }) {
  const { t, i18n } = useTranslation();
  const queryClient = useQueryClient();
  const files = useQuery(filesQuery);
  const [over, setOver] = useState(false);
  const [share, setShare] = useState(0);
  const sending = useMutation({
    mutationFn: (chosen: File) => {
      setShare(0);
      const form = new FormData();
      form.append('purpose', 'fine-tune');
      form.append('file', chosen);
      return upload('/v1/files', form, file, setShare);
    },
    onSuccess: async (added) => {
      onChange(added.id);
      await queryClient.invalidateQueries({ queryKey: filesQuery.queryKey });
    },
  });
  const removing = useMutation({
    mutationFn: deleteFile,
    onSuccess: async (_, id) => {
      if (value === id) onChange(null);
      await queryClient.invalidateQueries({ queryKey: filesQuery.queryKey });
    },
  });
  const take = (chosen: File | null | undefined) => chosen && sending.mutate(chosen);
  const name = sending.variables?.name ?? '';
  return (
    <div className={css.picker}>
      <Text size="sm" c="dimmed">
        {t('training.dataText')}
      </Text>
      <div
        className={css.drop}
        data-over={over}
        onDragOver={(event) => {
          event.preventDefault();
          setOver(true);
        }}
        onDragLeave={() => setOver(false)}
        onDrop={(event) => {
          event.preventDefault();
          setOver(false);
          take(event.dataTransfer.files[0]);
        }}
      >
        {sending.isPending ? (
          <div className={css.progress} role="status">
            <Text size="sm">
              {share < 1
                ? t('training.uploading', { name, percent: `${Math.floor(100 * share)}%` })
                : t('training.checking', { name })}
            </Text>
            <Progress value={100 * share} animated={share >= 1} aria-label={name} mt={6} />
          </div>
        ) : (
          <>
            <Icon name="upload" />
            <Text size="sm">{t('training.drop')}</Text>
            <FileButton
              onChange={take}
              accept=".jsonl,.json,.csv,.tsv,.txt,.md,application/jsonl"
              inputProps={{ 'aria-label': t('training.choose') }}
            >
              {(props) => (
                <Button {...props} size="compact-sm" variant="light">
                  {t('training.choose')}
                </Button>
              )}
            </FileButton>
          </>
        )}
      </div>
      {sending.error ? <Refusal error={sending.error} name={name} /> : null}
      {removing.error ? <ErrorNote error={removing.error} /> : null}
      {files.data && files.data.length > 0 ? (
        <Radio.Group value={value} onChange={onChange} label={t('training.files')}>
          <ul className={css.files}>
            {files.data.map((each) => (
              <li key={each.id}>
                <Radio
                  value={each.id}
                  className={css.file}
                  label={each.filename}
                  description={[
                    t('training.rows', { count: each.rows }),
                    bytes(each.bytes),
                    ago(each.created_at, i18n.language),
                  ].join(' · ')}
                />
                <ActionIcon
                  variant="subtle"
                  color="gray"
                  aria-label={t('training.deleteFile', { name: each.filename })}
                  onClick={() => removing.mutate(each.id)}
                >
                  <Icon name="trash" size={17} />
                </ActionIcon>
              </li>
            ))}
          </ul>
        </Radio.Group>
      ) : null}
      <Fold title={t('training.dataFormat')}>
        <CopyText text={EXAMPLE} label={t('training.dataFormat')} />
      </Fold>
    </div>
  );
}

/** The validation report: which lines, and why. */
function Refusal({ error, name }: { error: Error; name: string }) {
  const { t } = useTranslation();
  const report = error instanceof ApiError && error.code === 'invalid_training_file' ? reportOf(error.message) : null;
  if (!report || report.lines.length === 0) return <ErrorNote error={error} />;
  return (
    <Alert
      color="red"
      variant="light"
      icon={<Icon name="warning" />}
      title={t('training.refused', { name })}
      role="alert"
    >
      <Text size="sm" lang="en">
        {report.summary}
      </Text>
      <ul className={css.lines}>
        {report.lines.map(({ line, message }) => (
          <li key={line}>
            <strong>{t('training.line', { line })}</strong> <span lang="en">{message}</span>
          </li>
        ))}
      </ul>
      {report.more ? (
        <Text size="sm" lang="en">
          {report.more}
        </Text>
      ) : null}
      <Text size="sm" mt="xs">
        {t('errors.invalid_training_file_do')}
      </Text>
    </Alert>
  );
}
