import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { ago, bytes } from '@/lib/format';
import type { DataFile } from '@/types/api';
import { ActionIcon, Button, FileButton, Progress, Radio, Text } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState, type ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import css from './FilePicker.module.css';
import { dropped, picked, type Picked } from './gather';
import { deleteFile, filesQuery } from './queries';
import { Refusal } from './Refusal';
import type { Uploading } from './useUpload';

export interface Choice {
  label: string;
  accept?: string;
  several?: boolean;
  folder?: boolean;
}

interface Props {
  uploading: Uploading;
  drop: string; // the words in the field
  choices: readonly Choice[];
  onTake?: (chosen: readonly Picked[]) => void; // the first is sent unless this decides
  fits?: (file: DataFile) => boolean;
  rows: (count: number) => string;
  value: string | null;
  onChange: (id: string | null) => void;
  children?: ReactNode; // below the field
}

/** A file to drop or to choose, or one of those that were uploaded before. What is refused says which lines. */
export function FilePicker({ uploading, drop, choices, onTake, fits, rows, value, onChange, children }: Props) {
  const { t, i18n } = useTranslation();
  const queryClient = useQueryClient();
  const { purpose, sending, share, name } = uploading;
  const files = useQuery(filesQuery(purpose));
  const [over, setOver] = useState(false);
  const removing = useMutation({
    mutationFn: deleteFile,
    onSuccess: async (_, id) => {
      if (value === id) onChange(null);
      await queryClient.invalidateQueries({ queryKey: filesQuery(purpose).queryKey });
    },
  });
  const take = (chosen: readonly Picked[]) => {
    if (chosen[0] && onTake) onTake(chosen);
    else if (chosen[0]) sending.mutate(chosen[0].file);
  };
  const fitting = files.data?.filter((each) => !fits || fits(each)) ?? [];
  return (
    <div className={css.picker}>
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
          void dropped(event.dataTransfer).then(take);
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
            <Text size="sm">{drop}</Text>
            {choices.map((choice) => (
              <Choose key={choice.label} choice={choice} onTake={take} />
            ))}
          </>
        )}
      </div>
      {children}
      {sending.error ? <Refusal error={sending.error} name={name} /> : null}
      {removing.error ? <ErrorNote error={removing.error} /> : null}
      {fitting.length > 0 ? (
        <Radio.Group value={value} onChange={onChange} label={t('training.files')}>
          <ul className={css.files}>
            {fitting.map((each) => (
              <li key={each.id}>
                <Radio
                  value={each.id}
                  className={css.file}
                  label={each.filename}
                  description={[rows(each.rows), bytes(each.bytes), ago(each.created_at, i18n.language)].join(' · ')}
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
    </div>
  );
}

function Choose({ choice, onTake }: { choice: Choice; onTake: (chosen: readonly Picked[]) => void }) {
  const { label, accept, several = false, folder = false } = choice;
  return (
    <FileButton
      multiple={several}
      onChange={(chosen: File | File[] | null) => onTake(picked(chosen === null ? [] : [chosen].flat()))}
      {...(accept ? { accept } : {})}
      inputProps={{ 'aria-label': label, ...(folder ? { webkitdirectory: '' } : {}) }}
    >
      {(props) => (
        <Button {...props} size="compact-sm" variant="light">
          {label}
        </Button>
      )}
    </FileButton>
  );
}
